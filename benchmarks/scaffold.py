"""What an organ learns alone between the base's embeddings and head, and what of it the whole base can use.

    python benchmarks/scaffold.py            # SmolLM2-135M-Instruct, minutes on two cores (make bench-scaffold)
    python benchmarks/scaffold.py --quick    # a small random model, for the test suite

Layers of the base are trained on the King James Bible, in their own place: in the whole recipient, and alone in the
minimal scaffold, once per learning rate. All take the same steps on the same blocks, turn and turn about, so that
their seconds can be compared on a busy machine. Then each organ goes into the whole base, in the place of its layers
(replace) and right behind them (insert), and perplexity is measured on held-out chapters (domain) and on Python source
(control). Peak memory (VmHWM, Linux only) is of a process that trains two steps. One seed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from apart import memory, reset_peak, run_apart
from extract import ROOT
from transformers import AutoModelForCausalLM

from not_hf import DonorModel, TransplantedForCausalLM

sys.path[:0] = [str(ROOT / "examples")]
import demo  # noqa: E402 (the base, the texts, the measure; commit, versions and hardware, as in its own results)

WAYS = {  # name: scaffold, learning rate
    "in the recipient": ("full", 3e-4),
    "alone": ("minimal", 3e-4),
    "alone, faster": ("minimal", 1e-3),
}
FULL = {"steps": 30, "batch": 2, "block": 128, "eval_chars": 5_000, "spans": [(0, 3), (8, 16), (27, 30)]}
QUICK = {"steps": 2, "batch": 1, "block": 32, "eval_chars": 300, "spans": [(1, 3)]}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Train, measure, print the table, write the numbers."""
    parser = argparse.ArgumentParser(description="Organs trained alone against organs trained in their recipient.")
    parser.add_argument("--quick", action="store_true", help="one span, two steps, for the test suite")
    parser.add_argument("--spans", nargs="+", help="other layers, as 8-16")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "not_hf", help="where the base is kept")
    parser.add_argument("--output", type=Path, help="JSON file for the numbers")
    options = parser.parse_args(arguments)
    commit, size = demo.commit(), dict(QUICK if options.quick else FULL)
    if options.spans:
        size["spans"] = [tuple(map(int, span.split("-"))) for span in options.spans]
    with tempfile.TemporaryDirectory() as scratch:
        base = demo.unpack_base(options.cache)
        tokenizer, blocks, texts = demo.prepare_text(base, SimpleNamespace(text=None, **size))
        untouched = demo.measure(AutoModelForCausalLM.from_pretrained(base), tokenizer, texts)
        spans = {
            f"{i}-{j}": compare(base, (i, j), size, tokenizer, blocks, texts, Path(scratch, f"{i}-{j}"))
            for i, j in size["spans"]
        }
    found = {"size": size, "base": untouched, "spans": spans, "commit": commit, **demo.provenance(__file__)}
    print(table(found))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(found, indent=2) + "\n")
    return found


def compare(
    base: Path, span: tuple[int, int], size: dict[str, Any], tokenizer: Any, blocks: Any, texts: Any, folder: Path
) -> dict[str, Any]:
    """Every way to train the organ of one span, and what each gives in the whole base."""
    donor = DonorModel.from_base(base, span, mode="replace")
    donor.save_pretrained(folder / "start")
    models = {
        way: TransplantedForCausalLM.from_pretrained(base, donor, scaffold=scaffold, is_trainable=True)
        for way, (scaffold, _) in WAYS.items()
    }
    at_start = {"in_the_scaffold": demo.measure(models["alone"], tokenizer, texts)}
    seconds = train(models, blocks, size)
    peaks = {scaffold: run_apart(peak, scaffold, base, folder / "start") for scaffold in ("full", "minimal")}
    found: dict[str, Any] = {"untrained": at_start}
    for way, model in models.items():
        model.save_pretrained(folder / way)
        found[way] = {
            "learning_rate": WAYS[way][1],
            "parameters": model.num_parameters(),
            "trained": model.get_nb_trainable_parameters()[0],
            "seconds_per_step": statistics.median(seconds[way]),
            "peak_memory": peaks[WAYS[way][0]],
        }
        if WAYS[way][0] == "minimal":
            found[way]["in_the_scaffold"] = demo.measure(model, tokenizer, texts)
    ratios = [a / b for a, b in zip(seconds["alone"], seconds["in the recipient"], strict=True)]
    del models, model
    whole = AutoModelForCausalLM.from_pretrained(base)
    for way, row in found.items():
        organ = folder / ("start" if way == "untrained" else way)
        for mode, position in {"replace": span[0], "insert": span[1]}.items():
            whole = TransplantedForCausalLM.from_pretrained(whole, organ, mode=mode, position=position)
            row[mode] = demo.measure(whole, tokenizer, texts)
            whole = whole.unload()
    return {"organs": found, "seconds_ratio": statistics.median(ratios)}


def train(models: dict[str, Any], blocks: Any, size: dict[str, Any]) -> dict[str, list[float]]:
    """AdamW, warm-up and linear decay; each model takes each step before the next. Returns seconds of the steps."""
    steps, warmup = size["steps"], max(1, size["steps"] // 10)
    rows = torch.tensor([block["input_ids"] for block in blocks])  # (blocks, seq)
    generator = torch.Generator().manual_seed(0)
    taken = torch.randperm(len(rows), generator=generator)[: steps * size["batch"]].view(steps, -1)
    learning = {way: [p for p in model.parameters() if p.requires_grad] for way, model in models.items()}
    optimizers = {way: torch.optim.AdamW(learning[way], lr=WAYS[way][1], weight_decay=0.0) for way in models}
    seconds: dict[str, list[float]] = {way: [] for way in models}
    for n in range(steps):
        ids = rows[taken[n]]  # (batch, seq)
        for way, model in models.items():
            start = time.perf_counter()
            for group in optimizers[way].param_groups:
                group["lr"] = WAYS[way][1] * min((n + 1) / warmup, (steps - n) / max(1, steps - warmup))
            model.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(learning[way], 1.0)
            optimizers[way].step()
            optimizers[way].zero_grad()
            seconds[way].append(time.perf_counter() - start)
    for model in models.values():
        model.eval()
    return seconds


def peak(scaffold: str, base: Path, organ: Path, warm: Callable[[], None]) -> int:
    """Bytes by which a process grows that loads, and trains two steps of one block of 128 tokens."""
    warm()
    before = reset_peak()
    model = TransplantedForCausalLM.from_pretrained(base, organ, scaffold=scaffold, is_trainable=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.arange(128)[None]  # (batch=1, seq)
    for _ in range(2):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return memory("VmHWM") - before


def table(found: dict[str, Any]) -> str:
    """In Markdown."""

    def pair(measured: dict[str, float] | None) -> str:
        return " / ".join(f"{measured[name]:,.1f}" for name in ("domain", "control")) if measured else ""

    lines = [
        f"Base: {pair(found['base'])} (perplexity of the domain / of the control).",
        "",
        "| layers | trained | rate | in the scaffold | in the base, replace | in the base, insert |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for span, one in found["spans"].items():
        for way, row in one["organs"].items():
            cells = [pair(row.get(where)) for where in ("in_the_scaffold", "replace", "insert")]
            lines.append(f"| {span} | {way} | {row.get('learning_rate', '')} | {' | '.join(cells)} |")
    lines += ["", "| layers | trained | parameters, M | learning, M | peak memory, MB | time per step |"]
    lines += ["| --- | --- | ---: | ---: | ---: | ---: |"]
    for span, one in found["spans"].items():
        for way, ratio in {"in the recipient": 1.0, "alone": one["seconds_ratio"]}.items():
            row = one["organs"][way]
            sizes = f"{row['parameters'] / 1e6:,.1f} | {row['trained'] / 1e6:,.1f} | {row['peak_memory'] / 1e6:,.0f}"
            lines.append(f"| {span} | {way} | {sizes} | {ratio:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
