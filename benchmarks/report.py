"""What the runs of `train.py` say: differences to LoRA, tables and pictures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from methods import METHODS, REFERENCE, mean, seconds_per_step

COLUMNS = (
    "method", "rate, rows", "steps", "time per row", "memory, MB", "with checkpointing", "file, MB",
    "loss on fresh rows − LoRA's", "scale", "domain", "control", "domain at 1", "control at 1",
    "control at equal domain: method, LoRA",
)  # fmt: skip

Curve = Callable[[float], float]


def compare(record: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One dict for each run: its losses (nats per token), costs, and how it stands to LoRA's.

    Where a wider search has led to another setting later, the runs with that one count.
    """
    runs = [run for run in record if run["given"]["method"] and "test" in run["given"]["held"]]
    runs = list({(run["given"]["method"], *place(run)): run for run in runs}.values())
    order = list(METHODS)
    runs.sort(key=lambda run: (order.index(run["given"]["method"]), run["given"]["seed"]))
    bases = {run["given"]["domain"]: run for run in record if run["given"]["method"] is None}
    references = {place(run): run for run in runs if run["given"]["method"] == REFERENCE}
    costs: dict[tuple[str, int], dict[str, Any]] = {}
    for run in record:
        if not run["given"]["held"]:  # made to measure costs
            of = costs.setdefault((run["given"]["method"], run["given"]["batch"]), {})
            of["saving" if run["given"].get("gradient_checkpointing") else "plain"] = run
    return [describe(run, references[place(run)], bases[run["given"]["domain"]], costs) for run in runs]


def place(run: dict[str, Any]) -> tuple[str, int]:
    """What a run shares with those that it is compared with."""
    return run["given"]["domain"], run["given"]["seed"]


def describe(
    run: dict[str, Any], reference: dict[str, Any], base: dict[str, Any], costs: dict[tuple[str, int], dict[str, Any]]
) -> dict[str, Any]:
    """The comparison of one run."""
    given, test = run["given"], run["held"]["test"]
    scale, reference_scale = chosen_scale(run), chosen_scale(reference)
    other = reference["held"]["test"][reference_scale]
    batch_of_reference = max(batch for method, batch in costs if method == REFERENCE)  # by which time is counted
    cost, cost_of_reference = costs[given["method"], given["batch"]], costs[REFERENCE, batch_of_reference]
    seconds, seconds_of_reference = (seconds_per_step(each["plain"]["ends"], 2) for each in (cost, cost_of_reference))
    groups, groups_of_reference = per_group(run), per_group(reference)
    half = min(len(groups), len(groups_of_reference)) // 2
    found = {
        **{name: given[name] for name in ("method", "domain", "seed", "rate", "batch", "steps")},
        **{name: run[name] for name in ("trained", "file_bytes")},
        "row_cost_ratio": seconds / given["batch"] / (seconds_of_reference / batch_of_reference),
        **{f"peak_bytes_{way}": each["peak"] for way, each in cost.items()},
        "fresh": paired(groups[half:], groups_of_reference[half:]),
        "scale": float(scale),
        "paired": {name: paired(test[scale][name], other[name]) for name in ("domain", "control")},
        "base": {name: mean(values) for name, values in base["held"]["test"]["0"].items()},
        "losses": {key: {name: mean(values) for name, values in each.items()} for key, each in test.items()},
    }
    goal = max(mean(each["domain"]) for each in (test[scale], other))
    found["equal"] = at_domain_loss(goal, *(curves_of(each, base) for each in (run, reference)))
    return found


def chosen_scale(run: dict[str, Any]) -> str:
    """The scale with the least loss on text set aside."""
    return min(run["held"]["choose"], key=lambda scale: math.fsum(run["held"]["choose"][scale]["domain"]))


def per_group(run: dict[str, Any], size: int = 4) -> list[float]:
    """Losses of the training rows before they were learned from, each the mean of `size` rows or a batch of more."""
    steps = max(size // run["given"]["batch"], 1)
    return [mean(run["losses"][n : n + steps]) for n in range(0, len(run["losses"]), steps)]


def paired(mine: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """Mean difference of the losses of the same rows, and its standard error."""
    differences = [a - b for a, b in zip(mine, others, strict=False)]  # one of two runs may have made more steps
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
    return {"mean": mean(differences), "error": error}


def curves_of(run: dict[str, Any], base: dict[str, Any]) -> dict[str, Curve]:
    """Losses over the scale, for domain and control: straight lines between the base and what was measured."""
    import numpy as np

    measured = {"0": base["held"]["test"]["0"], **run["held"]["test"]}
    scales = sorted(measured, key=float)
    losses = {name: [mean(measured[scale][name]) for scale in scales] for name in ("domain", "control")}
    places = [float(scale) for scale in scales]
    return {name: lambda scale, each=each: float(np.interp(scale, places, each)) for name, each in losses.items()}


def at_domain_loss(goal: float, mine: dict[str, Curve], reference: dict[str, Curve]) -> dict[str, float]:
    """Both methods scaled down until the loss on the domain is `goal`: their losses there on the control."""

    def control(curves: dict[str, Curve]) -> float:
        first = next(n for n in range(1001) if curves["domain"](n / 1000) <= goal + 1e-9)
        return curves["control"](first / 1000)

    return {"domain": goal, "control": control(mine), "control_of_reference": control(reference)}


def tables(found: list[dict[str, Any]]) -> str:
    """The comparison as Markdown; of several seeds the median, with the smallest and the largest behind it."""
    lines = []
    for domain in dict.fromkeys(each["domain"] for each in found):
        here = [each for each in found if each["domain"] == domain]
        base = here[0]["base"]
        lines += [
            f"{domain}: perplexity of the base {math.exp(base['domain']):.2f}, "
            f"of the control {math.exp(base['control']):.2f}",
            "",
            f"| {' | '.join(COLUMNS)} |",
            f"| --- |{' ---: |' * (len(COLUMNS) - 1)}",
        ]
        for method in dict.fromkeys(each["method"] for each in here):
            lines.append(table_row([each for each in here if each["method"] == method]))
        lines.append("")
    return "\n".join(lines)


def table_row(mine: list[dict[str, Any]]) -> str:
    """The runs of a method on a text."""

    def middle(value: Callable[[dict[str, Any]], float]) -> str:
        values = sorted(value(each) for each in mine)
        spread = f" ({values[0]:.2f}–{values[-1]:.2f})" if len(values) > 1 else ""
        return f"{statistics.median(values):.2f}{spread}"

    def perplexity(name: str, scale: str | None = None) -> str:
        return middle(lambda each: math.exp(each["losses"][scale or f"{each['scale']:g}"][name]))

    first = mine[0]
    errors = [each["fresh"]["error"] for each in mine]
    fresh = mean([each["fresh"]["mean"] for each in mine])
    cells = [
        first["method"],
        f"{first['rate']:g}, {first['batch']}",
        f"{first['steps']}",
        f"{first['row_cost_ratio']:.2f}",
        f"{first['peak_bytes_plain'] / 1e6:.0f}",
        f"{first['peak_bytes_saving'] / 1e6:.0f}",
        f"{first['file_bytes'] / 1e6:.1f}",
        f"{fresh:+.4f} ± {math.hypot(*errors) / len(errors):.4f}",
        ", ".join(f"{each['scale']:g}" for each in mine),
        perplexity("domain"),
        perplexity("control"),
        perplexity("domain", "1"),
        perplexity("control", "1"),
        "–"
        if first["method"] == REFERENCE
        else ", ".join(
            middle(lambda each, key=key: math.exp(each["equal"][key])) for key in ("control", "control_of_reference")
        ),
    ]
    return f"| {' | '.join(cells)} |"


def draw(found: list[dict[str, Any]], path: Path) -> None:
    """Perplexity of the domain over that of the control along the scale, a panel for each text."""
    from matplotlib.figure import Figure

    domains = list(dict.fromkeys(each["domain"] for each in found))
    methods = list(dict.fromkeys(each["method"] for each in found))
    figure = Figure(figsize=(4.4 * len(domains) + 0.8, 5), layout="constrained")
    for panel, domain in zip(figure.subplots(1, len(domains), squeeze=False)[0], domains, strict=True):
        for each in found:
            if each["domain"] != domain:
                continue
            losses = sorted({"0": each["base"], **each["losses"]}.items(), key=lambda item: float(item[0]))
            points = [(math.exp(loss["control"]), math.exp(loss["domain"])) for _, loss in losses]
            label = each["method"] if each["seed"] == 0 and domain == domains[0] else None
            color = f"C{methods.index(each['method'])}"
            panel.plot(*zip(*points, strict=True), color=color, marker=".", linewidth=1, label=label)
        panel.set_xlabel("perplexity of the control")
        panel.set_ylabel("perplexity of the domain")
        panel.set_title(domain, loc="left", fontsize="medium")
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=min(3, len(domains) + 1), frameon=False, fontsize="small")
    figure.savefig(path, dpi=130)
