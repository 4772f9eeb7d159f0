"""What the runs of `several_organs.py` say: a table, how both texts stand together, the picture."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pictures import finish, panels_of
from question import Runs, markdown, percentages, spread
from report import paired

DOMAINS, CONTROL = ("kjv", "icd10"), "english"
NAMES = (*DOMAINS, CONTROL)
TOGETHER = "one organ of both texts: both, 1"
STACKED = "organs inserted at one place: both, 1"
PAIRS = {
    "Order at one place": (STACKED, "organs inserted at one place: both, the other order"),
    "One place or two": (STACKED, "organs inserted at two places: both, 1"),
    "Stacked or averaged": (STACKED, "organs inserted at one place: both, averaged"),
    "Stacked or summed": (STACKED, "organs inserted at one place: both, summed"),
}


def find(runs: Runs) -> dict[str, dict[str, Any]]:
    """Of each base: the losses of the texts in each combination, of all seeds; and pairs of them, row by row."""
    found: dict[str, dict[str, Any]] = {}
    rows: dict[tuple[str, str], list[float]] = {}
    for run in sorted(runs, key=lambda run: run["given"]["seed"]):
        base, way = run["given"]["base"], run["given"]["way"]
        combinations = found.setdefault(base, {"losses": {}})["losses"]
        for what, losses in run["losses"].items():
            name = what if what == "base" else f"{way}: {what}"
            of = combinations.setdefault(name, {text: [] for text in NAMES})
            for text in NAMES:
                of[text].append(losses[text])
        for what, of_rows in run.get("row_losses", {}).items():
            rows.setdefault((base, f"{way}: {what}"), []).extend(each for text in DOMAINS for each in of_rows[text])
    for base, of in found.items():
        of["pairs"] = {
            question: {"one": one, "other": other, **paired(rows[base, other], rows[base, one])}
            for question, (one, other) in PAIRS.items()
            if (base, one) in rows and (base, other) in rows
        }
    return found


def headline(found: dict[str, Any]) -> str:
    """How much of what each gains alone is left when both are put into one model."""
    kept: dict[str, list[float]] = {}
    middles = {base: medians_of(of["losses"]) for base, of in found.items()}
    for middle in middles.values():
        for way in ways_of(middle):
            if shares := kept_of(way, middle):
                kept[way] = kept.get(way, []) + list(shares.values())
    said = "; ".join(f"{way} {percentages(shares)}" for way, shares in kept.items()) or "not measured"
    best = {base: each for base, middle in middles.items() if (each := best_for_both(middle))}
    compared = [(gains_of(middles[base], TOGETHER), best[base][1]) for base in best if TOGETHER in middles[base]]
    more = sum(statistics.mean(together) > statistics.mean(apart) for together, apart in compared)
    verdict = "Yes" if all(min(gains) > 0 for _, gains, _ in best.values()) else "Not in every model"
    named = "; ".join(
        f"{base} {name}, {statistics.mean(gains):.2f} (of {statistics.mean(alone):.2f})"
        for base, (name, gains, alone) in best.items()
    )
    return (
        f"**{verdict}, and a part of what each had learned is lost.** Best of what is trained apart, by the mean of "
        f"what both texts gain in nats per token (of what the same method gains on each alone): {named}. One organ "
        f"trained on both gains more in {more} of {len(compared)} models. Of what each gains alone, this is "
        f"left when both are in one model with a weight of 1: {said}."
    )


def best_for_both(middle: dict[str, dict[str, float]]) -> tuple[str, list[float], list[float]] | None:
    """Of what is trained apart, the combination that gains most on both texts; its gains, and those of each alone.

    `None` before any was measured.
    """
    gains = {name: gains_of(middle, name) for name in middle if ": both, " in name}
    apart = {name: each for name, each in gains.items() if f"{name.partition(':')[0]}: {DOMAINS[0]} alone" in middle}
    if not apart:
        return None
    best = max(apart, key=lambda name: statistics.mean(apart[name]))
    way = best.partition(":")[0]
    alone = [gains_of(middle, f"{way}: {domain} alone")[n] for n, domain in enumerate(DOMAINS)]
    return f"“{best}”", apart[best], alone


def gains_of(middle: dict[str, dict[str, float]], name: str) -> list[float]:
    """What a combination takes off the loss of each text, in nats per token."""
    return [middle["base"][domain] - middle[name][domain] for domain in DOMAINS]


def details(found: dict[str, Any]) -> str:
    """Tables of perplexities, and what is kept when both texts are put together."""
    parts = []
    for base, of_base in found.items():
        rows = of_base["losses"]
        lines = [
            [name, *(spread([math.exp(loss) for loss in of[text]]) for text in NAMES)] for name, of in rows.items()
        ]
        parts += [markdown([base, *NAMES], lines), "", *said_of(rows), *map(compared, of_base["pairs"].items()), ""]
    return "\n".join(parts)


def said_of(rows: dict[str, dict[str, list[float]]]) -> list[str]:
    """The answers for one base, from its numbers."""
    middle = medians_of(rows)

    def of_both(name: str) -> float:
        return sum(middle[name][domain] for domain in DOMAINS) / len(DOMAINS)

    def gains(name: str) -> str:
        of = {text: middle["base"][text] - middle[name][text] for text in NAMES}
        return (
            f"{of['kjv']:+.3f} nats on King James, {of['icd10']:+.3f} on the codes, {of[CONTROL]:+.3f} on the control"
        )

    combined = [name for name in middle if name != "base" and not name.endswith(" alone")]
    best = min((name for name in combined if "one organ" not in name), key=of_both)
    lines = [f"- Trained apart or in turn, the best for both texts is {best}: {gains(best)}."]
    lines += [f"- {name}: {gains(name)}." for name in combined if "one organ" in name]
    for way in ways_of(middle):
        if shares := kept_of(way, middle):
            said = " and ".join(f"{100 * share:.0f} % on {domain}" for domain, share in shares.items())
            lines.append(f"- {way}, together: of the gain that each has alone, {said}.")
    return lines


def medians_of(rows: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    """The medians of the seeds."""
    return {name: {text: statistics.median(losses) for text, losses in of.items()} for name, of in rows.items()}


def ways_of(names: Iterable[str]) -> list[str]:
    """The ways of training that combinations come from."""
    return list(dict.fromkeys(name.partition(":")[0] for name in names if name != "base"))


def kept_of(way: str, middle: dict[str, dict[str, float]]) -> dict[str, float]:
    """Which share of what each gains alone is left when both are in one model with a weight of 1; empty if unknown."""
    both, shares = middle.get(f"{way}: both, 1"), {}
    for domain in DOMAINS:
        alone = middle.get(f"{way}: {domain} alone")
        if not both or not alone or (gain := middle["base"][domain] - alone[domain]) <= 0:
            return {}
        shares[domain] = (middle["base"][domain] - both[domain]) / gain
    return shares


def compared(pair: tuple[str, dict[str, Any]]) -> str:
    """Which of two combinations has the lower loss, as far as the rows of both texts tell."""
    question, of = pair
    by = f"{abs(of['mean']):.4f} ± {of['error']:.4f} nats (mean and standard error over rows)"
    if not abs(of["mean"]) > 2 * of["error"]:
        return f"- {question}: no clear difference between “{of['one']}” and “{of['other']}”, {by}."
    ahead, behind = (of["one"], of["other"]) if of["mean"] > 0 else (of["other"], of["one"])
    return f"- {question}: “{ahead}” is better than “{behind}” by {by}."


def draw(found: dict[str, Any], path: Path) -> None:
    """What each combination gains on both texts and on the control: a panel for each base."""
    shown = {base: of["losses"] for base, of in found.items()}
    names = [name for name in reversed(dict.fromkeys(itertools.chain(*shown.values()))) if name != "base"]
    figure, (panels,) = panels_of(1, len(shown), width=4.5, height=0.26 * len(names) + 0.6)
    for (base, of), panel in zip(shown.items(), panels, strict=True):
        for number, text in enumerate(NAMES):
            for height, name in enumerate(names):
                gains = [statistics.median(of["base"][text]) - loss for loss in of.get(name, {}).get(text, ())]
                if gains:
                    panel.plot(statistics.median(gains), height, "os^"[number], color=f"C{number}", label=text)
                    panel.hlines(height, min(gains), max(gains), color=f"C{number}")
        panel.axvline(0, color="0.35", linewidth=0.8)
        panel.set_ylim(-0.7, len(names) - 0.3)
        panel.set_yticks(range(len(names)), names if panel is panels[0] else [""] * len(names), fontsize="small")
        panel.set_title(base, loc="left", fontsize="medium")
        panel.set_xlabel("gain, nats per token")
    finish(figure, path)
