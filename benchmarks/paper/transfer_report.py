"""What the runs of `transfer.py` say: gains over the distance of the recipient, a table, the verdict, the picture."""

from __future__ import annotations

import itertools
import math
import statistics
from pathlib import Path
from typing import Any

from question import Runs, is_at_end, markdown, percentages, spread

ORIGIN = "base"  # the recipient that the organ was trained in


def find(runs: Runs) -> list[dict[str, Any]]:
    """One dict for each base: its recipients, each with the values of all seeds."""
    found: dict[str, dict[str, Any]] = {}
    searched: dict[str, dict[str, dict[float, float]]] = {}
    for run in runs:
        base = run["given"]["base"]
        if "moved" not in run:
            ((method, rate),) = run["given"]["rates"].items()
            searched.setdefault(base, {}).setdefault(method, {})[rate] = run["loss"]
            continue
        case = found.setdefault(base, {"base": base, "identical": [], "recipients": {}})
        case["identical"].append(run["identical"])
        for moved in run["moved"]:
            name = f"{moved['recipient']}, {moved['steps']} steps" if moved["steps"] else ORIGIN
            into = case["recipients"].setdefault(
                name, {"text": moved["recipient"], "weights": [], "kl": [], "alone": []}
            )
            for key, value in (("weights", moved.get("weights", 0.0)), ("kl", moved.get("kl", 0.0))):
                into[key].append(value)
            into["alone"].append(moved["alone"])
            for way, loss in moved["with"].items():
                into.setdefault("gain", {}).setdefault(way, []).append(moved["alone"] - loss)
    for base, case in found.items():
        case["rates_at_end"] = [method for method, losses in searched.get(base, {}).items() if is_at_end(losses)]
        for into in case["recipients"].values():
            at_home = case["recipients"][ORIGIN]["gain"]
            into["kept"] = {
                way: [gain / whole for gain, whole in zip(gains, at_home[way], strict=True)]
                for way, gains in into["gain"].items()
            }
    return list(found.values())


def headline(found: list[dict[str, Any]]) -> str:
    """Whether organs gain in other fine-tunes of their base, and how much of it they keep there, by text."""
    gains: list[float] = []
    kept: dict[str, dict[str, list[float]]] = {}
    for case in found:
        for into in (into for name, into in case["recipients"].items() if name != ORIGIN):
            for way, shares in into["kept"].items():
                of_text = kept.setdefault(into["text"], {})
                of_text.setdefault("organs" if way.startswith("organ") else way, []).append(statistics.median(shares))
                gains += [statistics.median(into["gain"][way])] if way.startswith("organ") else []
    count = sum(gain > 0 for gain in gains)
    verdict = "Yes" if count == len(gains) else "Mostly" if 2 * count > len(gains) else "No"
    shares = "; ".join(
        f"in one trained on {text}, {', '.join(f'{way} {percentages(each)}' for way, each in of_text.items())}"
        for text, of_text in kept.items()
    )
    return (
        f"**{verdict}, in other fine-tunes of its base:** the loss falls in {count} of {len(gains)} cases. Kept of "
        f"the gain at home: {shares}."
    )


def details(found: list[dict[str, Any]]) -> str:
    """Tables of what is kept of the gain, and how it falls with the distance."""
    parts = []
    for case in found:
        ways = list(case["recipients"][ORIGIN]["gain"])
        rows = [row_of(name, into, ways) for name, into in case["recipients"].items()]
        heads = ["recipient", "distance, %", "KL, nats", "perplexity alone", *(f"kept: {way}" for way in ways)]
        home = case["recipients"][ORIGIN]["gain"]
        gains = "; ".join(f"{way} {spread(home[way], 3)}" for way in ways)
        parts += [
            f"{case['base']}; gain in the base, nats: {gains}",
            "",
            markdown(heads, rows),
            "",
            *said_of(case),
            "",
        ]
    return "\n".join(parts)


def row_of(name: str, into: dict[str, Any], ways: list[str]) -> list[str]:
    """A recipient: its distance, and the share of the gain that each way keeps."""
    kept = [spread([100 * share for share in into["kept"][way]], 0) + " %" for way in ways]
    distance = spread([100 * each for each in into["weights"]], 3)
    return [name, distance, spread(into["kl"], 4), spread([math.exp(loss) for loss in into["alone"]]), *kept]


def said_of(case: dict[str, Any]) -> list[str]:
    """The answer for one base, from its numbers."""
    reloaded = [same for each in case["identical"] for same in each.values()]
    lines = [f"- Reloaded, the logits are the same bit for bit in {sum(reloaded)} of {len(reloaded)} trainings."]
    if case["rates_at_end"]:
        lines.append(f"- Best with the smallest or largest rate that was tried: {'; '.join(case['rates_at_end'])}.")
    away = [into for name, into in case["recipients"].items() if name != ORIGIN]
    for way in case["recipients"][ORIGIN]["gain"]:
        useful = sum(statistics.median(into["gain"][way]) > 0 for into in away)
        courses = [course(text, way, away) for text in dict.fromkeys(into["text"] for into in away)]
        lines.append(f"- {way}: a gain in {useful} of {len(away)} other models. Kept of it: {'; '.join(courses)}.")
    return lines


def course(text: str, way: str, away: list[dict[str, Any]]) -> str:
    """How much of the gain is kept in the recipients that were trained on a text, from the nearest to the farthest."""
    points = sorted(
        (statistics.median(into["kl"]), statistics.median(into["kept"][way])) for into in away if into["text"] == text
    )
    said = f"{text}, " + " to ".join(
        f"{100 * share:.0f} % at a KL of {kl:.3f}" for kl, share in dict.fromkeys((points[0], points[-1]))
    )
    shares = [share for _, share in points]
    if len(shares) == 1:
        return said
    falls = all(later <= earlier for earlier, later in itertools.pairwise(shares)) and shares[-1] < shares[0]
    return said + (", falling with the distance" if falls else ", not falling steadily with the distance")


def draw(found: list[dict[str, Any]], path: Path) -> None:
    """Gain over the recipient's distance in weights and in KL: a row of panels for each base."""
    from not_hf.training.figure import add_grid, new_figure

    axes = {
        "weights": ("norm of the weights' difference, % of the base's", 100),
        "kl": ("KL(base || recipient), nats", 1),
    }
    figure = new_figure(11, 4.2 * len(found), "the picture")
    for case, panels in zip(found, figure.subplots(len(found), 2, squeeze=False), strict=True):
        for panel, (key, (label, factor)) in zip(panels, axes.items(), strict=True):
            for n, way in enumerate(case["recipients"][ORIGIN]["gain"]):
                texts = dict.fromkeys(into["text"] for into in case["recipients"].values() if into["text"] != ORIGIN)
                for text, marker in zip(texts, "os^", strict=False):
                    line = [into for into in case["recipients"].values() if into["text"] in (ORIGIN, text)]
                    line.sort(key=lambda into: statistics.median(into[key]))
                    places = [factor * statistics.median(into[key]) for into in line]
                    gains = [into["gain"][way] for into in line]
                    style = {"color": f"C{n}", "marker": marker, "linewidth": 1.2}
                    panel.plot(places, list(map(statistics.median, gains)), **style, label=f"{way}; {text}")
                    panel.vlines(places, list(map(min, gains)), list(map(max, gains)), color=f"C{n}", linewidth=1)
            panel.axhline(0, color="0.35", linewidth=0.8)
            panel.set_xlabel(label)
            add_grid(panel)
        panels[0].set_ylabel("gain on King James, nats per token")
        panels[0].set_title(f"{case['base']}: what the organ gains in another model", loc="left", fontsize="medium")
        panels[1].set_title("the same over KL; lines by the text of the recipient", loc="left", fontsize="medium")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize="small")
    figure.savefig(path, dpi=100)
