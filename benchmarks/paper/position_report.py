"""What the runs of `position.py` say: the best positions, a table, the verdict on early ones, the picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from question import Runs, is_at_end, markdown, spread

WAYS = ("untrained", "moved", "trained there")
NEAR = 0.01  # nats: a perplexity that is 1 % higher
THIRDS = ("first third", "middle third", "last third")


def find(runs: Runs) -> list[dict[str, Any]]:
    """One dict for each base, kind of organ and way: the losses of the domain at each position, of all seeds."""
    cases: dict[tuple[str, str, str, str], dict[str, Any]] = {}
    searched: dict[tuple[str, str, str], dict[float, float]] = {}
    for run in runs:
        given = run["given"]
        if "choose" in given["rows"]:
            of_kind = searched.setdefault((given["base"], given["mode"], given["init"]), {})
            of_kind[given["rate"]] = run["places"][0]["choose"]
            continue
        way = WAYS[2 if not isinstance(given["places"], int) else 1 if given["rate"] else 0]
        for place in run["places"]:
            key = (given["base"], place["mode"], given["init"], way)
            if key[1:] == ("replace", "copy", WAYS[0]) and place["position"] == run["cut_from"]:
                continue  # the layers in their own place: the base
            about = dict(zip(("base", "mode", "init", "way"), key, strict=True))
            last = run["depth"] - (given["layers"] if place["mode"] == "replace" else 0)
            case = cases.setdefault(key, {**about, "last": last, "without": run["base_losses"], "positions": {}})
            losses = case["positions"].setdefault(str(place["position"]), {name: [] for name in given["rows"]})
            for name in given["rows"]:
                losses[name].append(place[name])
    for key, losses in searched.items():
        if case := cases.get((*key, WAYS[-1])):
            case["rate_at_end"] = is_at_end(losses)
    return [{**case, **best_of(case)} for case in cases.values()]


def best_of(case: dict[str, Any]) -> dict[str, Any]:
    """The best position by the median of seeds, in all and in each third; `None` where all positions are equal."""
    middle = {int(n): statistics.median(each["domain"]) for n, each in case["positions"].items()}
    thirds: dict[str, list[float]] = {third: [] for third in THIRDS}
    for position, loss in middle.items():
        thirds[THIRDS[third_of(position, case)]].append(loss)
    best = min(middle, key=middle.__getitem__)
    differ = max(middle.values()) - middle[best] > 1e-4
    return {
        "best": best if differ else None,
        "best_third": THIRDS[third_of(best, case)] if differ else None,
        "thirds": {third: min(losses, default=None) for third, losses in thirds.items()},
    }


def third_of(position: int, case: dict[str, Any]) -> int:
    """0, 1 or 2: which third of the legal positions one belongs to."""
    return min(2, 3 * position // max(1, case["last"]))


def headline(cases: list[dict[str, Any]]) -> str:
    """Whether early positions are best, and which organ was."""
    trained, untrained = (
        [case for case in cases if case["way"] == way and case["best"] is not None] for way in (WAYS[-1], WAYS[0])
    )
    early, early_untrained = (sum(case["best_third"] == THIRDS[0] for case in of) for of in (trained, untrained))
    verdict = verdict_of(early, len(trained))[0]
    near = sum(case["thirds"][THIRDS[0]] - min(medians(case)) < NEAR for case in trained if case["thirds"][THIRDS[0]])
    places = max((len(case["positions"]) for case in trained), default=0)
    said = (
        f"of up to {places} positions at which an organ was trained, the best lies in the first third in {early} of "
        f"{len(trained)} cases, and one there is within {NEAR:.0%} of the best perplexity in {near}. Of all positions "
        f"of an untrained organ, the best lies in the first third in {early_untrained} of {len(untrained)} cases."
    )
    return " ".join([f"**{verdict}:** {said.replace('%', ' %')}", *best_of_all(cases)])


def details(cases: list[dict[str, Any]]) -> str:
    """A table of the best positions, and what they say about early ones."""
    heads = ["base", "organ", "best position", "perplexity there", *THIRDS, "without organ", "control there, without"]
    rows = []
    for case in cases:
        organ = f"{case['init']}, {case['mode']}, {case['way']}"
        there = case["positions"][str(case["best"])]["domain"] if case["best"] is not None else None
        best = f"{case['best']} of {case['last']}" if there else "all equal"
        thirds = [f"{math.exp(loss):.2f}" if loss is not None else "–" for loss in case["thirds"].values()]
        perplexity = spread([math.exp(loss) for loss in there]) if there else "–"
        without = f"{math.exp(case['without']['domain']):.2f}"
        rows.append([case["base"], organ, best, perplexity, *thirds, without, of_control(case)])
    said = [
        of_claim(way, [case for case in cases if case["way"] == way])
        for way in ("untrained", "moved", "trained there")
    ]
    searched = [case["rate_at_end"] for case in cases if "rate_at_end" in case]
    said.append(
        "- The learning rate was searched with the organ right behind the layers that it was cut from or, if it "
        "replaces layers, in their place, and then used at all positions. It is the smallest or largest of those "
        f"tried in {sum(searched)} of {len(searched)} cases."
        if searched
        else ""
    )
    return "\n".join([markdown(heads, rows), "", *(line for line in said if line)])


def best_of_all(cases: list[dict[str, Any]]) -> list[str]:
    """Of each base, the organ and position with the lowest perplexity after training."""
    lines = []
    for base in dict.fromkeys(case["base"] for case in cases):
        here = [
            case for case in cases if case["base"] == base and case["way"] == WAYS[-1] and case["best"] is not None
        ]
        if here:
            case = min(here, key=lambda case: min(medians(case)))
            loss = min(medians(case))
            change = f"{100 * (math.exp(loss - case['without']['domain']) - 1):+.1f} %".replace("-", "−")
            organ = f"{case['init']}, {case['mode']}, at {case['best']} of {case['last']}"
            lines.append(f"{base}, the best that was trained: {organ}, perplexity {math.exp(loss):.2f} ({change}).")
    return lines


def of_control(case: dict[str, Any]) -> str:
    """Perplexity of the control at the best position, and without the organ, where it was measured."""
    if case["best"] is None or "control" not in case["without"]:
        return "–"
    there = [math.exp(loss) for loss in case["positions"][str(case["best"])]["control"]]
    return f"{spread(there)}, {math.exp(case['without']['control']):.2f}"


def of_claim(way: str, cases: list[dict[str, Any]]) -> str:
    """In how many cases an early position is best, as the paper has it."""
    decided = [case for case in cases if case["best"] is not None]
    if not decided:
        return ""
    early = [case for case in decided if case["best_third"] == THIRDS[0]]
    verdict = verdict_of(len(early), len(decided))[1]
    where = ", ".join(f"in the {third} in {sum(case['best_third'] == third for case in decided)}" for third in THIRDS)
    gaps = [max(losses) - min(losses) for losses in map(medians, decided)]
    return (
        f"- {way.capitalize()}, {len(decided)} sweeps: the best position lies {where}. Best and worst differ by "
        f"{spread(gaps)} nats. That early positions are best is {verdict}."
    )


def verdict_of(early: int, count: int) -> tuple[str, str]:
    """What is said of the claim, in a headline and in a sentence, if that many of the cases are best early."""
    if not early:
        return "Not early", "not borne out"
    if early == count:
        return "Early", "borne out"
    if 2 * early < count:
        return "Mostly not early", "mostly not borne out"
    return "Early in part", "borne out in part"


def medians(case: dict[str, Any]) -> list[float]:
    """The loss of the domain at each position."""
    return [statistics.median(each["domain"]) for each in case["positions"].values()]


def draw(cases: list[dict[str, Any]], path: Path) -> None:
    """Perplexity over position: a row of panels for each base, a column for each way."""
    from matplotlib.ticker import MaxNLocator

    from not_hf.training.figure import add_grid, new_figure, scale_perplexities

    bases = list(dict.fromkeys(case["base"] for case in cases))
    columns = {"inserted": ("insert", False), "in place of layers": ("replace", False), "trained there": (None, True)}
    figure = new_figure(12, 3.8 * len(bases), "the picture")
    for base, panels in zip(bases, figure.subplots(len(bases), 3, squeeze=False), strict=True):
        for panel, (title, (mode, trained)) in zip(panels, columns.items(), strict=True):
            shown = [case for case in cases if case["base"] == base and trained == (case["way"] == WAYS[-1])]
            here = [case for case in shown if mode in (None, case["mode"])]
            if not here:  # not run yet
                panel.set_axis_off()
                continue
            draw_panel(panel, here)
            scale_perplexities(panel, [math.exp(loss) for case in here for loss in medians(case)])
            add_grid(panel)
            panel.set_title(f"{base}: organ {title}", loc="left", fontsize="medium")
            panel.xaxis.set_major_locator(MaxNLocator(integer=True))
            panel.set_xlabel("position (layers of the base below the organ)")
            panel.legend(fontsize="small", edgecolor="none")
        panels[0].set_ylabel("perplexity of King James, held out")
    figure.savefig(path, dpi=100)


def draw_panel(panel: Any, cases: Iterable[dict[str, Any]]) -> None:
    """A line for each kind of organ, in the same colors, with the range of its seeds, and one for the base."""
    for case in sorted(
        cases, key=lambda case: (WAYS.index(case["way"]), case["mode"], case["init"])
    ):  # the same colors
        places = sorted(map(int, case["positions"]))
        of_seeds = [[math.exp(loss) for loss in case["positions"][str(place)]["domain"]] for place in places]
        mode = f"{case['mode']}, " if case["way"] == WAYS[-1] else ""
        middle = [statistics.median(each) for each in of_seeds]
        (line,) = panel.plot(places, middle, marker=".", label=f"{mode}{case['init']}, {case['way']}")
        panel.vlines(places, list(map(min, of_seeds)), list(map(max, of_seeds)), color=line.get_color())
        without = math.exp(case["without"]["domain"])
    panel.axhline(without, color="0.35", linestyle="--", linewidth=1, label=f"without organ, {without:.2f}")
