"""A plot of a sweep over positions."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from not_hf.training.figure import add_grid, new_figure, scale_perplexities

if TYPE_CHECKING:
    pass


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
    figure = new_figure(7, 4, "plot")
    from matplotlib.ticker import MaxNLocator

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
    scale_perplexities(axes, [base["perplexity"], *(row["perplexity"] for row in rows)])
    axes.set_xlabel("position")
    axes.set_ylabel("perplexity, with its 95 % interval")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize="small")
    add_grid(axes)
    figure.savefig(path, dpi=150)


def _label(name: str, row: Mapping[str, Any]) -> str:
    return f"{name}, {row['perplexity']:,.2f}"
