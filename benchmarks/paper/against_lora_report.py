"""What the runs of `against_lora.py` say: both protocols, a table, the verdict on the paper's gap, the picture."""

from __future__ import annotations

import functools
import math
import statistics
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import equal_time
from pictures import finish, panels_of
from question import Runs, is_at_end, markdown, spread

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
from methods import INSERTED, REFERENCE, SEARCH_SEED, mean  # noqa: E402 (from the folder above)

DOMAIN = "kjv"
PAPER = {  # perplexity, and that of the organ: GPT-2, TinyLlama and GPT-OSS
    "LoRA": ((668.40, 17.33), (460.41, 54.15), (98.37, 34.56)),
    "full": ((1352.05, 17.33), (788.36, 54.15)),
}
RATIOS = {method: sorted(theirs / organ for theirs, organ in pairs) for method, pairs in PAPER.items()}
ONE, FAIR = "one rate", "fair"


def perplexity(losses: list[float]) -> float:
    """Perplexity of rows by their losses; infinite where training has left no number, or too large a one."""
    loss = mean(losses)
    return math.exp(loss) if loss < 100 else math.inf


def rates_of(swept: Mapping[str, Mapping[float, float]]) -> dict[str, dict[str, float]]:
    """For each method the rate of both protocols, by perplexities on text set aside."""
    organ = swept[INSERTED]
    learned = [rate for rate in organ if organ[rate] <= organ[min(organ)]]  # at the least rate hardly anything is
    one = max(learned, key=lambda rate: max(swept[lora][rate] for lora in loras(swept)) / organ[rate])
    return {method: {ONE: one, FAIR: min(rates, key=lambda rate: rates[rate])} for method, rates in swept.items()}


def loras(methods: Iterable[str]) -> list[str]:
    """The forms of LoRA among methods."""
    return [method for method in methods if "LoRA" in method]


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
        swept = dict(sorted(swept.items()))  # the same colors for each base
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


def values(each: dict[str, Any], method: str, protocol: str, name: str = "domain") -> list[Any]:
    """What was measured on a base of a method by a protocol, of all seeds."""
    rate = each["rates"][method][protocol]
    return [run[name] for run in each["runs"] if (run["method"], run["rate"]) == (method, rate)]


def gap(each: dict[str, Any]) -> tuple[str, float, float]:
    """The LoRA that is worst at one rate for all, its perplexity ÷ the inserted organ's, and ÷ that of the base."""

    def at_one(method: str) -> float:
        return statistics.median(values(each, method, ONE))

    worst = max(loras(each["rates"]), key=at_one)
    return worst, to_inserted(each, worst), at_one(worst) / each["before"]["domain"]


def to_inserted(each: dict[str, Any], method: str) -> float:
    """A method's perplexity ÷ the inserted organ's at one rate for all, seed by seed; the median."""
    pairs = zip(values(each, method, ONE), values(each, INSERTED, ONE), strict=True)
    return statistics.median(of / inserted for of, inserted in pairs)


def headline(found: list[dict[str, Any]]) -> str:
    """Whether one rate for all gives the paper's gaps, what it does to LoRA, and who is ahead at the best rates."""
    cases = [(each, *gap(each)) for each in found]
    reached = [harm > 1 for _, _, ratio, harm in cases if ratio >= RATIOS["LoRA"][0]]
    verdict = f"A gap to LoRA like the paper's in {len(reached)} of {len(cases)} models" if reached else "No such gap"
    verdict += ", where the rate damages LoRA" if reached and all(reached) else ""
    one, full, best = [], [], []
    for each, lora, ratio, harm in cases:
        one.append(f"{each['base']} {shown(ratio)} and {shown(harm)} ({lora}, {each['rates'][lora][ONE]:g})")
        if "full" in each["rates"]:
            full.append(to_inserted(each, "full"))
        fair = {method: statistics.median(values(each, method, FAIR)) for method in each["rates"]}
        ahead = min(fair, key=fair.__getitem__)
        best.append(f"{each['base']} {ahead}, {fair[ahead]:.2f} (inserted organ {fair[INSERTED]:.2f})")
    alone = [largest_ratio(each, REFERENCE) for each in found if REFERENCE in each["sweep"]]
    words = [
        f"**{verdict}.** At one rate for all, that of the rates tried which is worst for a LoRA, its perplexity",
        f"divided by the inserted organ's and by that of the untrained base: {'; '.join(one)}.",
        f"With {REFERENCE} alone, a rate gives such a gap in {sum(each >= RATIOS['LoRA'][0] for each in alone)} of",
        f"{len(alone)} models.",
    ]
    if full:
        ratios = ", ".join(map(shown, full))
        words.append(f"Full fine-tuning at that rate: {ratios} times, in the paper {RATIOS['full'][0]:.1f} or more.")
    return " ".join([*words, f"Lowest with the best rate of each: {'; '.join(best)}."])


def shown(ratio: float) -> str:
    """A ratio without digits that mean nothing."""
    return f"{ratio:,.0f}" if ratio > 1000 else f"{ratio:.1f}"


def largest_ratio(each: dict[str, Any], method: str) -> float:
    """A method's perplexity ÷ the inserted organ's, on text set aside, at the rate where it is largest.

    Rates at which the organ does not learn are left out.
    """
    theirs, organ = (dict(each["sweep"][name]) for name in (method, INSERTED))
    return max(theirs[rate] / organ[rate] for rate in organ if organ[rate] <= organ[min(organ)])


def details(found: list[dict[str, Any]]) -> str:
    """Both protocols on each base as a table, and what they say of the paper's claim."""
    return "\n\n".join(map(details_of, found))


def details_of(each: dict[str, Any]) -> str:
    """Table and words for a base."""
    before, rates = each["before"], each["rates"]
    of = functools.partial(values, each)

    one = rates[INSERTED][ONE]
    heads = ["method", f"at {one:g}, domain", "control", "best rate", "domain", "control"]
    rows = []
    for method in rates:
        cells = [[spread(of(method, way, name)) for name in ("domain", "control")] for way in (ONE, FAIR)]
        rows.append([method, *cells[0], f"{rates[method][FAIR]:g}", *cells[1]])
    lora, _, harm = gap(each)
    ratios = {
        method: [theirs / organ for theirs, organ in zip(of(method, ONE), of(INSERTED, ONE), strict=True)]
        for method in (lora, "full")
        if method in rates
    }
    paper = ", ".join(f"{each[0]:.1f} to {each[-1]:.1f} ({method})" for method, each in RATIOS.items())
    losses = of(lora, ONE, "training_loss")[0]
    at_end = [method for method, points in each["sweep"].items() if is_at_end(dict(points))]
    words = [
        f"With one rate for all, {one:g}, the perplexity is so many times that of the inserted organ:",
        ", ".join(f"{spread(each)} ({method})" for method, each in ratios.items()) + f"; in the paper {paper}.",
        "One rate for all is enough for such a gap to LoRA."
        if statistics.median(ratios[lora]) >= RATIOS["LoRA"][0]
        else "No rate that was tried gives such a gap to LoRA.",
        f"At that rate {lora} ends at {harm:.2f} times the perplexity of the untrained base:",
        "training has damaged the model" if harm > 1 else "it has learned, but less",
        f"(loss on the rows of a step: {losses['first']:.2f} at first, {losses['highest']:.2f} at most,",
        f"{losses['last']:.2f} at last).",
        f"Best with the smallest or largest rate tried: {'; '.join(at_end)}." if at_end else "",
        equal_time.learned(DOMAIN) if each["base"] == "smollm2" else "",
    ]
    title = f"{each['base']}, perplexity before: domain {before['domain']:.2f}, control {before['control']:.2f}"
    return f"{title}\n\n{markdown(heads, rows)}\n\n{' '.join(words).strip()}"


def draw(found: list[dict[str, Any]], path: Path) -> None:
    """Perplexity over the learning rate, a panel for each base; a line is the one rate, stars are the best rates."""
    from matplotlib.ticker import NullFormatter

    figure, panels = panels_of(1, len(found), height=4.6)
    for panel, each in zip(panels[0], found, strict=True):
        least = min(value for points in each["sweep"].values() for _, value in points)
        for n, (method, points) in enumerate(each["sweep"].items()):
            drawn = [(rate, min(value, 1e6 * least)) for rate, value in points]
            panel.plot(*zip(*drawn, strict=True), color=f"C{n}", marker=".", label=method)
            best = min(drawn, key=lambda point: point[1])
            panel.plot(*best, color=f"C{n}", marker="*", markersize=12, markeredgecolor="black", linestyle="none")
        panel.axhline(each["set_aside"], color="black", linewidth=0.8, label="the untrained base")
        panel.axvline(each["rates"][INSERTED][ONE], color="gray", linestyle="--", label="one rate for all")
        panel.set(xscale="log", yscale="log", xlabel="learning rate", ylabel="perplexity of King James, set aside")
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.set_ylim(0.9 * least, 60 * least)  # what lies above is destroyed
        panel.set_title(f"{each['base']}: stars are the best rates", loc="left", fontsize="medium")
    finish(figure, path)
