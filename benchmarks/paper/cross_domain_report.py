"""What the runs of `cross_domain.py` say: organs against the others, a table, the verdict, the picture."""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path
from typing import Any

import equal_time
from distance import curves_of
from pictures import finish, panels_of
from question import Runs, markdown, spread

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
from figures import OUTPUTS  # noqa: E402
from methods import INSERTED, REFERENCE  # noqa: E402 (from the folder above, like the next)

TRAINED, OTHERS = "kjv", ("icd10", "english")
WAYS = ("as trained", "at equal distance", "at equal gain")


def find(runs: Runs) -> list[dict[str, Any]]:
    """For each run its places, and the losses of all texts where it is compared with the others of its seed.

    Seeds that not every method has yet are left out.
    """
    import numpy as np

    before = {run["given"]["base"]: run["places"] for run in runs if run["given"]["method"] is None}
    trained = [run for run in runs if run["given"]["method"]]
    methods = {(run["given"]["base"], run["given"]["method"]) for run in trained}
    found = []
    for base, seed in dict.fromkeys((run["given"]["base"], run["given"]["seed"]) for run in trained):
        mine = [run for run in trained if (run["given"]["base"], run["given"]["seed"]) == (base, seed)]
        if len(mine) < sum(of == base for of, _ in methods):
            continue
        places = [{**before[base], **run["places"]} for run in mine]
        curves = [curves_of(each) for each in places]
        distance, gain = min(each["distance"][-1] for each in curves), max(each[TRAINED].min() for each in curves)
        for run, at_scales, curve in zip(mine, places, curves, strict=True):
            at = (-1, int(np.argmax(curve["distance"] >= distance)), int(np.argmax(curve[TRAINED] <= gain)))
            losses = [{name: float(curve[name][n]) for name in (TRAINED, *OTHERS)} for n in at]
            given = {name: run["given"][name] for name in ("base", "method", "seed", "rate")}
            found.append({**given, "places": at_scales, "losses": dict(zip(WAYS, losses, strict=True))})
    return found


def headline(found: list[dict[str, Any]]) -> str:
    """Whether organs lose less on other texts, and whether that is more than a smaller step.

    It is more if organs are ahead twice as often as behind in each of the three ways.
    """
    gaps = {base: list(gaps_of(runs).values()) for base, runs in by_base(found).items()}
    every = list(itertools.chain.from_iterable(gaps.values()))
    ahead = {way: sum(max(each[way]) < 0 for each in every) for way in WAYS}
    behind = {way: sum(min(each[way]) > 0 for each in every) for way in WAYS}
    where = {base: sum(all(max(of_way) < 0 for of_way in each.values()) for each in of) for base, of in gaps.items()}
    kept, named = sum(where.values()), ", ".join(f"{base} {count}" for base, count in where.items() if count)
    verdict = (
        "The paper's regularization does not show"
        if ahead[WAYS[0]] <= behind[WAYS[0]]
        else "More than a smaller step away from the base"
        if all(ahead[way] > 2 * behind[way] for way in WAYS)
        else "For the most part a smaller step away from the base"
    )
    once = [base for base, runs in by_base(found).items() if len({run["seed"] for run in runs}) == 1]
    counts = ", ".join(f"{ahead[way]} ({behind[way]}) {way}" for way in WAYS)
    return (
        f"**{verdict}.** Of {len(every)} comparisons, the organ's loss on a text that was not trained is smaller (or "
        f"larger) with every seed in {counts}; smaller in all three in {kept}{f' ({named})' if named else ''}."
        + (f" One seed only: {', '.join(once)}." if once else "")
    )


def by_base(found: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The runs of each base."""
    return {
        base: [run for run in found if run["base"] == base] for base in dict.fromkeys(run["base"] for run in found)
    }


def details(found: list[dict[str, Any]]) -> str:
    """Organs against LoRA and full fine-tuning as a table for each base."""
    return "\n\n".join(map(details_of, by_base(found).values()))


def details_of(runs: list[dict[str, Any]]) -> str:
    """Table and words for a base."""
    rows = [
        [f"{text}: {' − '.join(pair)}", *(spread(gaps, 3) for gaps in ways.values())]
        for (text, *pair), ways in gaps_of(runs).items()
    ]
    before = ", ".join(f"{name} {math.exp(runs[0]['places']['0'][name]):.2f}" for name in (TRAINED, *OTHERS))
    title = f"{runs[0]['base']}, trained on {TRAINED}; perplexity before: {before}."
    heads = ["loss of the organ − the other's, nats per token", *WAYS]
    words = equal_time.forgotten() if runs[0]["base"] == "smollm2" else ""
    return f"{title}\n\n{markdown(heads, rows)}\n\n{words}".strip()


def gaps_of(runs: list[dict[str, Any]]) -> dict[tuple[str, str, str], dict[str, list[float]]]:
    """By text, organ and other method: the loss of the organ less the other's in each way, of all seeds."""
    losses = {(run["method"], run["seed"]): run["losses"] for run in runs}
    methods, seeds = (dict.fromkeys(run[name] for run in runs) for name in ("method", "seed"))
    return {
        (text, organ, other): {
            way: [losses[organ, seed][way][text] - losses[other, seed][way][text] for seed in seeds] for way in WAYS
        }
        for text in OTHERS
        for organ in (INSERTED, OUTPUTS)
        for other in (REFERENCE, "full")
        if methods.keys() >= {organ, other}
    }


def draw(found: list[dict[str, Any]], path: Path) -> None:
    """Perplexity of each text over the distance from the base, along the scale; a row of panels for each base."""
    bases, methods = (list(dict.fromkeys(run[name] for run in found)) for name in ("base", "method"))
    texts = (TRAINED, *OTHERS)
    figure, panels = panels_of(len(bases), len(texts))
    for base, row in zip(bases, panels, strict=True):
        for panel, text in zip(row, texts, strict=True):
            for run in (run for run in found if run["base"] == base):
                points = sorted((place["distance"], math.exp(place[text])) for place in run["places"].values())
                color = f"C{methods.index(run['method'])}"
                panel.plot(*zip(*points, strict=True), color=color, marker=".", linewidth=1, label=run["method"])
            panel.set(xlabel="KL from the base on english, nats per token", ylabel="perplexity")
            panel.set_title(f"{base}: {text}{' (trained)' if text == TRAINED else ''}", loc="left", fontsize="medium")
    finish(figure, path)
