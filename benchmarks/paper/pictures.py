"""How the pictures of the paper's questions look."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def panels_of(rows: int, columns: int, width: float = 4.0, height: float = 3.8) -> tuple[Any, Any]:
    """A figure of at least 900 pixels, and its panels, `(rows, columns)`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(7.0, width * columns), height * rows + 0.7), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def finish(figure: Any, path: Path) -> None:
    """Write a figure: light grids, and one legend that names each kind of line once."""
    named: dict[str, Any] = {}
    for panel in figure.axes:
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        lines, labels = panel.get_legend_handles_labels()
        named |= dict(zip(labels, lines, strict=True))
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize="small")
    figure.savefig(path, dpi=130)
