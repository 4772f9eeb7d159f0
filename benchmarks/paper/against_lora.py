"""Organs against LoRA and full fine-tuning: one learning rate for all, as in the paper, and the best one of each.

    python benchmarks/paper/against_lora.py [--base NAME]     # names: bases.py; an hour of one core for SmolLM2
    python benchmarks/paper/against_lora.py --quick           # two methods, two rates: two minutes
    python benchmarks/paper/against_lora.py --smoke           # a small random model, for the test suite
    python benchmarks/paper/against_lora.py --report          # train nothing: answer and picture of the runs so far

The paper (arXiv 2601.13580) reports perplexities of 17.33, 54.15 and 34.56 for an organ of three layers inserted into
GPT-2, TinyLlama and GPT-OSS; of 668.40, 460.41 and 98.37 for LoRA, and of 1352.05 and 788.36 for full fine-tuning of
the first two. Here an organ inserted as there, but starting as a no-op, the organ that this project recommends, LoRA,
rsLoRA (which multiplies what it has learned by 16 instead of 2) and full fine-tuning make the same number of steps on
the same rows at each of seven rates over three and a half decades. Two protocols follow from that sweep:

- one rate for all: that at which a LoRA is furthest behind the inserted organ, as long as that organ learns something;
- fair: for each method the rate that is best on text set aside.

Both are measured on other held-out text (8,192 tokens of King James and of the English encyclopedia, three seeds). At
equal time instead of equal steps, `train.py` has measured the fair protocol; its figures are read, not run again. The
experts of small-gpt-oss are not linear modules, so LoRA adapts its attention only.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

from against_lora_report import DOMAIN, details, draw, find, headline, perplexity, rates_of
from question import ask, parser_of, size_of

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
import train  # noqa: E402 (from the folder above, like those that follow)
from figures import OUTPUTS  # noqa: E402
from methods import INSERTED, REFERENCE, SEARCH_SEED  # noqa: E402

COMPARED = (INSERTED, OUTPUTS, REFERENCE, "rsLoRA, r = 64", "full")
FULL: dict[str, Any] = {
    "methods": COMPARED, "rates": (1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2), "seeds": 3, "steps": 12,
    "batch": 2, "block": 128, "choose": 16, "test": 64,
}  # fmt: skip
QUICK = {**FULL, "methods": (INSERTED, REFERENCE), "rates": (3e-4, 1e-2), "seeds": 1, "steps": 3, "choose": 2}
FORMS: dict[str, dict[str, Any]] = {
    "full": FULL,
    "quick": {**QUICK, "test": 8},
    "smoke": {**QUICK, "methods": (INSERTED, REFERENCE, "full"), "block": 32, "test": 4},
}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Sweep the rates, train by both protocols, answer."""
    parser = parser_of(__file__, "Organs against LoRA, at one rate and at the best of each.", FORMS)
    return ask(parser, arguments, run_once, run_all, (find, headline, details, draw))


def run_all(record: Any, options: Any, pool: Any) -> None:
    """Measure the base, sweep the rates, then train by both protocols."""
    size, base = size_of(options, FORMS), options.base
    steps = size["steps"] * longer(base)
    shape = {"domain": DOMAIN, "block": size["block"], "pool": steps * size["batch"], "replay": 0}
    record(method=None, seed=0, **shape, held={"choose": size["choose"], "test": size["test"]}, scales=[0])
    run = functools.partial(record, **shape, scales=[1.0], batch=size["batch"], steps=steps)

    def sweep(pair: tuple[str, float]) -> tuple[str, float, float]:
        method, rate = pair
        found = run(method=method, rate=rate, seed=SEARCH_SEED, held={"choose": size["choose"]})
        return method, rate, perplexity(found["held"]["choose"]["1"]["domain"])

    swept: dict[str, dict[float, float]] = {method: {} for method in size["methods"]}
    for method, rate, value in pool.map(sweep, [(each, rate) for rate in size["rates"] for each in size["methods"]]):
        swept[method][rate] = value
    pairs = [(method, rate) for method, rates in rates_of(swept).items() for rate in sorted(set(rates.values()))]

    def train_by(each: tuple[int, tuple[str, float]]) -> None:
        seed, (method, rate) = each
        run(method=method, rate=rate, seed=seed, held={"test": size["test"]})

    list(pool.map(train_by, [(seed, pair) for seed in range(size["seeds"]) for pair in pairs]))


def run_once(base: str, **given: Any) -> dict[str, Any]:
    """Train and measure, as `train.py` does."""
    return train.run_once(base, **given)


def longer(base: str) -> int:
    """How many times as many steps a base gets; the small ones make them in a fraction of the time."""
    return 8 if base.startswith("small-") else 1


if __name__ == "__main__":
    sys.exit(0 if main() is not None else 1)
