"""A plot of a sweep over positions."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from not_hf.errors import NotHFError

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(
    rows: Sequence[Mapping[str, Any]],
    base: Mapping[str, float],
    best: Mapping[str, Any],
    path: str | os.PathLike[str],
) -> None:
    """Draw what `PositionSweep.plot` describes.

    Raises:
        NotHFError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ModuleNotFoundError as error:
        raise NotHFError("plot needs matplotlib; pip install not_hf[plot]") from error
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.axhline(
        base["perplexity"], color="0.35", linestyle="--", linewidth=1, label=_label("without the organ", base)
    )
    if math.isfinite(base["low"]) and math.isfinite(base["high"]):
        axes.axhspan(base["low"], base["high"], color="0.35", alpha=0.1, linewidth=0)
    for n, mode in enumerate(dict.fromkeys(row["mode"] for row in rows)):
        drawn = [row for row in rows if row["mode"] == mode]
        places, values = [row["position"] for row in drawn], [row["perplexity"] for row in drawn]
        lows, highs = [row["low"] for row in drawn], [row["high"] for row in drawn]
        axes.plot(places, values, color=f"C{n}", marker="o", markersize=4, linewidth=1.5, label=mode)
        axes.fill_between(places, lows, highs, color=f"C{n}", alpha=0.2, linewidth=0)
        axes.vlines(places, lows, highs, color=f"C{n}", linewidth=1)
    where = (best["position"], best["perplexity"])
    label = _label(f"best: {best['mode']} at {best['position']}", best)
    axes.plot(*where, color="black", marker="*", markersize=12, linestyle="none", label=label)
    _scale(axes, [base["perplexity"], *(row["perplexity"] for row in rows)])
    axes.set_xlabel("position")
    axes.set_ylabel("perplexity, with its 95 % interval")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize="small")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def _label(name: str, row: Mapping[str, Any]) -> str:
    return f"{name}, {row['perplexity']:,.2f}"


def _scale(axes: Axes, values: Sequence[float]) -> None:
    """Use a log scale where the values are far apart."""
    from matplotlib.ticker import LogFormatter, LogLocator

    finite = [value for value in values if math.isfinite(value)]
    if finite and max(finite) > 3 * min(finite):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(math.inf, math.inf)))
        axes.minorticks_off()
