"""What the plots of trainings and evaluations have in common; matplotlib is optional."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from not_hf.errors import NotHFError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def new_figure(width: float, height: float, needed_by: str) -> Figure:
    """Make an empty figure, in inches.

    Raises:
        NotHFError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise NotHFError(f"{needed_by} needs matplotlib; pip install matplotlib") from error
    return Figure(figsize=(width, height), layout="constrained")


def add_grid(panel: Axes) -> None:
    """Draw a light grid, and axes on two sides only."""
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)


def scale_perplexities(panel: Axes, values: Iterable[float]) -> None:
    """Use a log scale where the values are far apart."""
    from matplotlib.ticker import LogFormatter, LogLocator

    finite = [value for value in values if math.isfinite(value)]
    if finite and max(finite) > 3 * min(finite):
        panel.set_yscale("log")
        subs = (1, 2, 5) if max(finite) < 1e4 * min(finite) else (1,)
        panel.yaxis.set_major_locator(LogLocator(subs=subs))
        panel.yaxis.set_major_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(math.inf, math.inf)))
        panel.minorticks_off()
