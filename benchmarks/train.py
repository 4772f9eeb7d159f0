"""Learning from fresh text: organs against LoRA and full fine-tuning at equal time, each with its own best settings.

    python benchmarks/train.py            # three texts, three seeds, two methods: hours (make bench-train)
    python benchmarks/train.py --broad    # every method: one text, one seed: an hour
    python benchmarks/train.py --quick    # one text, one seed, three methods: ten minutes
    python benchmarks/train.py --long     # ten times the tokens: one text, one seed, two methods
    python benchmarks/train.py --replay   # every fourth row is general text: three texts, one seed, two methods
    python benchmarks/train.py --gpu      # millions of tokens of source code on a GPU, bfloat16: minutes of an H100
    python benchmarks/train.py --smoke    # a small random model, for the test suite

Time is what LoRA of rank 16 takes for 32 steps of 4 × 128 tokens (--gpu: 190 of 32 × 512); every method makes as many
steps as fit in, by the seconds of a step, which are measured first: of the processor, or on a GPU by the clock. No row
is seen twice. Learning rates and batch sizes are searched for each text with half the tokens (--gpu: a tenth), on text
set aside; --quick and --replay take what the full form found best. After training, the weights are moved to base +
scale · (trained − base), for every method; the scale is chosen on text set aside, too.

Measured: the loss on 8,192 held-out tokens of the text and of a general one (English encyclopedia), and the loss on
each training row before the step that learns from it: all methods see the same rows in the same order, so their
differences are paired, and less noisy. Each run is a process of its own with one thread (--gpu: all are made in this
one). What is in the output file is not run again, so that a run that was broken off goes on.
"""

from __future__ import annotations

import functools
import json
import math
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from apart import start_counting
from methods import METHODS, REFERENCE, SEARCH_SEED, fit, load, prepare, row_losses, seconds_per_step
from record import is_one_run, opened, parser_of
from report import compare, draw, tables
from texts import ROOT, TEXTS, read_blocks

CONTROL = "english"
MAIN = [REFERENCE, "organ, outputs"]
COMPARED = [
    *MAIN, "organ, all layers", "organ, upper half, cache", "LoRA, r = 16, upper half, cache",
    "LoRA, r = 16, loss in chunks", "LoRA+, r = 16", "LoRA, r = 64", "rsLoRA, r = 64", "full",
]  # fmt: skip
GPU_METHODS = [*MAIN, "LoRA, r = 256", "full"]
# Steps of 32 rows bear larger ones.
MORE_RATES = {"organ, outputs": [1.3e-3, 1.8e-3], "LoRA, r = 256": [1e-3, 2e-3], "full": [2.4e-4, 4.8e-4]}
FULL: dict[str, Any] = {
    "domains": ["kjv", "icd10", "french"], "methods": MAIN, "seeds": 3, "steps": 32, "search": 16,
    "block": 128, "choose": 16, "test": 64, "scales": [0.7, 1.0], "replay": 0, "pool": 320,
}  # fmt: skip
QUICK = {**FULL, "domains": ["kjv"], "seeds": 1, "methods": [*MAIN, "organ, all layers"], "search": 0, "steps": 16}
FORMS: dict[str, dict[str, Any]] = {
    "full": FULL,
    "broad": {**FULL, "domains": ["kjv"], "methods": COMPARED, "seeds": 1},
    "quick": {**QUICK, "choose": 4, "test": 16},
    "long": {**QUICK, "methods": MAIN, "steps": 320, "search": 32, "pool": 1536},
    "replay": {**FULL, "seeds": 1, "search": 0, "replay": 4},
    "gpu": {
        **{**FULL, "domains": ["code"], "seeds": 1, "steps": 1520, "search": 160, "bf16": True, "batch": 32},
        **{"block": 512, "pool": 22900, "choose": 32, "methods": GPU_METHODS, "more_rates": MORE_RATES},
    },
    "smoke": {**QUICK, "replay": 4, "steps": 4, "block": 32, "pool": 24, "choose": 2, "test": 4},
}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Search settings, train, compare, print the tables, write the numbers and the pictures."""
    parser = parser_of("Organs against other ways of fine-tuning on fresh text.", FORMS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="beside LoRA of rank 16")
    parser.add_argument("--domains", nargs="+", choices=[name for name in TEXTS if name != CONTROL])
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--report", action="store_true", help="train nothing: tables and picture of the runs so far")
    options = parser.parse_args(arguments)
    if is_one_run(options, run_once):
        return {}
    given = {name: value for name in ("domains", "seeds") if (value := getattr(options, name))}
    size = {**FORMS[options.form], **given}
    methods = [REFERENCE, *(name for name in options.methods or size["methods"] if name != REFERENCE)]
    with opened(__file__, options, run_once, here=options.form in ("gpu", "smoke")) as (record, pool):
        if not options.report:
            shape = {name: size[name] for name in ("block", "pool", "replay", "bf16") if name in size}
            run_all(functools.partial(record, **shape), size, methods, pool)
    found = compare(list(record.runs.values()))
    record.save(form=options.form, comparison=found)
    print(tables(found))
    if options.output:
        draw(found, options.output.with_suffix(".png"))
    return {"comparison": found}


def run_all(run: Any, size: dict[str, Any], methods: list[str], pool: ThreadPoolExecutor) -> None:
    """Measure costs, search settings, train; seed by seed."""
    one_batch = size.get("batch")
    costs = {setting: cost(run, *setting) for setting in settings_of(methods, one_batch)}
    cost_of_reference = next(iter(costs.values()))
    pairs = [(domain, method) for domain in size["domains"] for method in methods]
    chosen = dict(zip(pairs, pool.map(lambda pair: search(run, size, *pair), pairs), strict=True))

    def train(seed: int, domain: str, method: str) -> None:
        rate, batch = chosen[domain, method]
        share = cost_of_reference["row"] / costs[method, batch]["row"]
        given = {"rate": rate, "batch": batch, "steps": max(2, round(size["steps"] * share) * 4 // batch)}
        held = {"choose": size["choose"], "test": size["test"]}
        run(method=method, domain=domain, seed=seed, **given, held=held, scales=size["scales"])

    list(pool.map(lambda domain: measure_base(run, size, domain), size["domains"]))
    list(pool.map(lambda each: train(*each), [(seed, *pair) for seed in range(size["seeds"]) for pair in pairs]))


def settings_of(methods: list[str], one_batch: int | None) -> list[tuple[str, int]]:
    """Methods with each of their batch sizes; that of LoRA by which time is counted comes first."""
    pairs = [(name, one_batch or batch) for name in methods for _, batch in METHODS[name].settings]
    return list(dict.fromkeys([(REFERENCE, one_batch or 4), *pairs]))


def search(run: Any, size: dict[str, Any], domain: str, method: str) -> tuple[float, int]:
    """The learning rate and batch size with the least loss on text set aside, at the better scale."""
    settings = [(rate, size.get("batch", batch)) for rate, batch in METHODS[method].settings]
    settings += [(rate, size["batch"]) for rate in size.get("more_rates", {}).get(method, ())]
    if not size["search"]:
        return best_settings().get((domain, method), settings[len(settings) // 2])

    def loss(setting: tuple[float, int]) -> float:
        rate, batch = setting
        steps, held = size["search"] * 4 // batch, {"choose": size["choose"]}
        given = {"rate": rate, "batch": batch, "steps": steps, "held": held, "scales": size["scales"]}
        found = run(method=method, domain=domain, seed=SEARCH_SEED, **given)
        return min(math.fsum(each["domain"]) for each in found["held"]["choose"].values())

    return min(settings, key=loss)


def best_settings() -> dict[tuple[str, str], tuple[float, int]]:
    """The learning rate and batch size of each text and method in the results of the full form."""
    found = json.loads((ROOT / "benchmarks" / "results" / "train.json").read_text("utf-8"))["comparison"]
    return {(each["domain"], each["method"]): (each["rate"], each["batch"]) for each in found}


def cost(run: Any, method: str, batch: int) -> dict[str, Any]:
    """Seconds of a row of training; besides, the peak memory with gradient checkpointing is measured."""
    given = {"method": method, "batch": batch, "domain": "kjv", "rate": 1e-4, "held": {}, "scales": []}
    run(**given, steps=3, gradient_checkpointing=True)
    found = run(**given, steps=2 + (24 // batch or 24))
    return {"row": seconds_per_step(found["ends"], 2) / batch}


def measure_base(run: Any, size: dict[str, Any], domain: str) -> dict[str, Any]:
    """The losses of the base."""
    return run(method=None, domain=domain, held={"choose": size["choose"], "test": size["test"]}, scales=[0])


def run_once(
    base: str, method: str | None, domain: str, block: int, pool: int, replay: int, held: dict[str, int],
    scales: list[float], seed: int = 0, rate: float = 0.0, batch: int = 1, steps: int = 0,
    gradient_checkpointing: bool = False, bf16: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Train, then measure at each scale.

    Args:
        method: Name of the method; `None` measures the base.
        pool: Rows that are read to be trained on, of which the first are used.
        held: Rows of each part of the text that losses are taken on; those of `test` of the control, too.
        replay: Each row of that number is of the control; 0: none.
        bf16: Whether matrices are multiplied in bfloat16; the weights are float32.
    """
    import torch

    read = functools.partial(kept_blocks, tokenizer=tokenizer_of(base), block=block)
    rows = read(domain, most=pool, part="train", seed=seed)[: steps * batch].clone()
    if replay and len(rows):
        general = read(CONTROL, most=-(-len(rows) // replay), part="train", seed=seed)
        rows[replay - 1 :: replay] = general[: len(rows[replay - 1 :: replay])]
    held_rows = {part: {"domain": read(domain, most=most, part=part)} for part, most in held.items()}
    if "test" in held:
        held_rows["test"]["control"] = read(CONTROL, most=held["test"], part="test")
    peak = start_counting()  # all that is imported is there; weights count, mapped ones as far as they are read
    torch.manual_seed(seed)
    found: dict[str, Any] = {}
    if method is None:
        model = load(base)
    else:
        prepared = prepare(method, base)
        model = prepared.model
        given = {"rate": rate, "batch": batch, "steps": steps, "seed": seed}
        found = fit(
            prepared,
            [(row, row) for row in rows.tolist()],
            **given,
            gradient_checkpointing=gradient_checkpointing,
            bf16=bf16,
        )
        found |= {"peak": peak(), "file_bytes": size_of(model)}
    losses: dict[str, dict[str, dict[str, list[float]]]] = {part: {} for part in held}
    for scale in scales:
        if method is not None:
            prepared.set_scale(scale)
        for part, texts in held_rows.items():
            losses[part][f"{scale:g}"] = {name: row_losses(model, rows) for name, rows in texts.items()}
    return {**found, "held": losses}


kept_blocks = functools.lru_cache(read_blocks)  # for the runs in one process


@functools.cache
def tokenizer_of(base: str) -> Any:
    """The tokenizer of the base, the same object each time: rows are kept by it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base)


def size_of(model: Any) -> int:
    """Bytes of the safetensors files that a model is saved in."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors"))


if __name__ == "__main__":
    sys.exit(0 if main() is not None else 1)
