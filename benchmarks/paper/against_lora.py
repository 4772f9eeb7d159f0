"""Organs against LoRA and full fine-tuning: one learning rate for all, as in the paper, and the best one of each.

    python benchmarks/paper/against_lora.py [--base NAME]     # the names are in bases.py; 40 core-minutes of SmolLM2
    python benchmarks/paper/against_lora.py --quick           # two methods, two rates: two minutes
    python benchmarks/paper/against_lora.py --smoke           # a small random model, for the test suite
    python benchmarks/paper/against_lora.py --report          # train nothing: answer and picture of the runs so far

The paper (arXiv 2601.13580) reports perplexities of 17.33, 54.15 and 34.56 for an organ of three layers inserted into
GPT-2, TinyLlama and GPT-OSS; of 668.40, 460.41 and 98.37 for LoRA, and of 1352.05 and 788.36 for full fine-tuning of
the first two. Here an organ inserted as there, the organ that this project recommends, LoRA and full fine-tuning make
the same number of steps on the same rows at each of eight rates over three and a half decades. Two protocols follow
from that sweep:

- one rate for all: that at which LoRA is furthest behind the inserted organ, as long as that organ learns something;
- fair: for each method the rate that is best on text set aside.

Both are measured on other held-out text (8,192 tokens of King James and of the English encyclopedia, three seeds). At
equal time instead of equal steps, `train.py` has measured the fair protocol; its figures are read, not run again.
"""

from __future__ import annotations

import functools
import math
import statistics
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import equal_time
from pictures import finish, panels_of
from question import Runs, concluded, markdown, opened, parser_of, spread

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
from methods import INSERTED, REFERENCE, mean  # noqa: E402 (from the folder above, like those that follow)
from record import is_one_run  # noqa: E402
from tables import OUTPUTS  # noqa: E402
from train import run_once  # noqa: E402

COMPARED = (INSERTED, OUTPUTS, REFERENCE, "full")
FULL: dict[str, Any] = {
    "methods": COMPARED, "rates": (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2), "seeds": 3, "steps": 16,
    "batch": 2, "block": 128, "choose": 16, "test": 64,
}  # fmt: skip
QUICK = {**FULL, "methods": (INSERTED, REFERENCE), "rates": (3e-4, 1e-2), "seeds": 1, "steps": 4}
FORMS: dict[str, dict[str, Any]] = {
    "full": FULL,
    "quick": {**QUICK, "choose": 4, "test": 16},
    "smoke": {**QUICK, "methods": COMPARED, "block": 32, "choose": 2, "test": 4},
}
DOMAIN, SEARCH_SEED = "kjv", 100
PAPER = {"GPT-2": (17.33, 668.40), "TinyLlama": (54.15, 460.41), "GPT-OSS": (34.56, 98.37)}  # organ, LoRA
RATIOS = [lora / organ for organ, lora in PAPER.values()]
ONE, FAIR = "one rate", "fair"


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Sweep the rates, train by both protocols, answer."""
    options = parser_of(__file__, "Organs against LoRA, at one rate and at the best of each.", FORMS)
    options = options.parse_args(arguments)
    if is_one_run(options, run_once):
        return {}
    with opened(options, run_once) as (record, pool):
        if not options.report:
            run_all(record, FORMS[options.form], options.base, pool)
    return concluded(record, options, find, answer, draw)


def run_all(record: Any, size: dict[str, Any], base: str, pool: ThreadPoolExecutor) -> None:
    """Measure the base, sweep the rates, then train by both protocols."""
    steps = size["steps"] * longer(base)
    shape = {"domain": DOMAIN, "block": size["block"], "pool": steps * size["batch"], "replay": 0}
    record(method=None, **shape, held={"choose": size["choose"], "test": size["test"]}, scales=[0])
    run = functools.partial(record, **shape, scales=[1.0], batch=size["batch"], steps=steps)

    def sweep(pair: tuple[str, float]) -> tuple[str, float, float]:
        method, rate = pair
        found = run(method=method, rate=rate, seed=SEARCH_SEED, held={"choose": size["choose"]})
        return method, rate, perplexity(found["held"]["choose"]["1"]["domain"])

    swept: dict[str, dict[float, float]] = {method: {} for method in size["methods"]}
    for method, rate, value in pool.map(sweep, [(each, rate) for rate in size["rates"] for each in size["methods"]]):
        swept[method][rate] = value
    pairs = [(method, rate) for method, rates in rates_of(swept).items() for rate in sorted(set(rates.values()))]

    def train(each: tuple[int, tuple[str, float]]) -> None:
        seed, (method, rate) = each
        run(method=method, rate=rate, seed=seed, held={"test": size["test"]})

    list(pool.map(train, [(seed, pair) for seed in range(size["seeds"]) for pair in pairs]))


def longer(base: str) -> int:
    """How many times as many steps a base gets; the small ones make them in a fraction of the time."""
    return 8 if base.startswith("small-") else 1


def perplexity(losses: list[float]) -> float:
    """Perplexity of rows by their losses; infinite where training has left no number, or too large a one."""
    loss = mean(losses)
    return math.exp(loss) if loss < 100 else math.inf


def rates_of(swept: Mapping[str, Mapping[float, float]]) -> dict[str, dict[str, float]]:
    """For each method the rate of both protocols, by perplexities on text set aside."""
    organ, lora = swept[INSERTED], swept[REFERENCE]
    learned = [rate for rate in organ if organ[rate] <= organ[min(organ)]]  # at the least rate hardly anything is
    one = max(learned, key=lambda rate: lora[rate] / organ[rate])
    return {method: {ONE: one, FAIR: min(rates, key=lambda rate: rates[rate])} for method, rates in swept.items()}


def find(runs: Runs) -> list[dict[str, Any]]:
    """For each base: its perplexities, the sweep, and the runs of both protocols."""
    found = []
    for base in dict.fromkeys(run["given"]["base"] for run in runs):
        mine = [run for run in runs if run["given"]["base"] == base]
        before = next(run["held"] for run in mine if run["given"]["method"] is None)
        swept: dict[str, dict[float, float]] = {}
        for run in mine:
            if run["given"].get("seed") == SEARCH_SEED:
                losses = run["held"]["choose"]["1"]["domain"]
                swept.setdefault(run["given"]["method"], {})[run["given"]["rate"]] = perplexity(losses)
        trained = [run for run in mine if run["given"]["method"] and "test" in run["given"]["held"]]
        found.append(
            {
                "base": base,
                "before": {name: perplexity(losses) for name, losses in before["test"]["0"].items()},
                "set_aside": perplexity(before["choose"]["0"]["domain"]),
                "sweep": {method: sorted(rates.items()) for method, rates in swept.items()},
                "rates": rates_of(swept),
                "runs": [described(run) for run in trained],
            }
        )
    return found


def described(run: dict[str, Any]) -> dict[str, Any]:
    """What is said of a run of either protocol: perplexities, and losses on the rows of the training steps."""
    losses = run["losses"]
    return {
        **{name: run["given"][name] for name in ("method", "rate", "seed", "steps")},
        **{name: perplexity(values) for name, values in run["held"]["test"]["1"].items()},
        "training_loss": {"first": losses[0], "highest": max(losses), "last": losses[-1]},
    }


def answer(found: list[dict[str, Any]]) -> str:
    """Both protocols on each base as a table, and what they say of the paper's claim."""
    return "\n\n".join(map(answer_of, found))


def answer_of(each: dict[str, Any]) -> str:
    """The answer for a base."""
    before, rates = each["before"], each["rates"]

    def of(method: str, protocol: str, name: str = "domain") -> list[Any]:
        rate = rates[method][protocol]
        return [run[name] for run in each["runs"] if (run["method"], run["rate"]) == (method, rate)]

    one, ratios = rates[REFERENCE][ONE], [b / a for a, b in zip(of(INSERTED, ONE), of(REFERENCE, ONE), strict=True)]
    heads = ["method", f"at {one:g}, domain", "control", "best rate", "domain", "control"]
    rows = []
    for method in rates:
        cells = [[spread(of(method, way, name)) for name in ("domain", "control")] for way in (ONE, FAIR)]
        rows.append([method, *cells[0], f"{rates[method][FAIR]:g}", *cells[1]])
    harm = statistics.median(of(REFERENCE, ONE)) / before["domain"]
    losses = of(REFERENCE, ONE, "training_loss")[0]
    fair = sorted((statistics.median(of(method, FAIR)), method) for method in rates)
    words = [
        f"With one rate for all, {one:g}, LoRA has {spread(ratios)} times the perplexity of the inserted organ; the",
        f"paper has {min(RATIOS):.1f} to {max(RATIOS):.1f} times.",
        "One rate for all is enough for such a gap."
        if statistics.median(ratios) >= min(RATIOS)
        else "No rate that was tried gives such a gap.",
        f"At that rate LoRA ends at {harm:.2f} times the perplexity of the untrained base:",
        "it has damaged the model" if harm > 1 else "it has learned, but less",
        f"(loss on the rows of a step: {losses['first']:.2f} at first, {losses['highest']:.2f} at most,",
        f"{losses['last']:.2f} at last).",
        f"With the best rate of each: {', '.join(f'{method} {value:.2f}' for value, method in fair)}.",
        equal_time.learned(DOMAIN) if each["base"] == "smollm2" else "",
    ]
    title = f"{each['base']}, perplexity before: domain {before['domain']:.2f}, control {before['control']:.2f}"
    return f"{title}\n\n{markdown(heads, rows)}\n\n{' '.join(words).strip()}"


def draw(found: list[dict[str, Any]], path: Path) -> None:
    """Perplexity over the learning rate, a panel for each base; a line is the one rate, stars are the best rates."""
    figure, panels = panels_of(1, len(found))
    for panel, each in zip(panels[0], found, strict=True):
        most = 1e4 * min(value for points in each["sweep"].values() for _, value in points)
        for n, (method, points) in enumerate(each["sweep"].items()):
            drawn = [(rate, min(value, most)) for rate, value in points]
            panel.plot(*zip(*drawn, strict=True), color=f"C{n}", marker=".", label=method)
            best = min(drawn, key=lambda point: point[1])
            panel.plot(*best, color=f"C{n}", marker="*", markersize=15, markeredgecolor="black", linestyle="none")
        panel.axhline(each["set_aside"], color="black", linewidth=0.8, label="the untrained base")
        panel.axvline(each["rates"][REFERENCE][ONE], color="gray", linestyle="--", label="one rate for all")
        panel.set(xscale="log", yscale="log", xlabel="learning rate", ylabel="perplexity of King James, set aside")
        panel.set_title(f"{each['base']}: stars are the best rates", loc="left", fontsize="medium")
    finish(figure, path)


if __name__ == "__main__":
    sys.exit(0 if main() is not None else 1)
