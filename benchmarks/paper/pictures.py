"""What the pictures of several questions have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from not_hf.training.figure import add_grid, new_figure


def panels_of(rows: int, columns: int, width: float = 4.0, height: float = 3.8) -> tuple[Any, Any]:
    """A figure of at least 900 pixels, and its panels, `(rows, columns)`."""
    figure = new_figure(max(7.0, width * columns), height * rows + 0.7, "the picture")
    return figure, figure.subplots(rows, columns, squeeze=False)


def finish(figure: Any, path: Path) -> None:
    """Write a figure, with one legend that names each kind of line once."""
    named: dict[str, Any] = {}
    for panel in figure.axes:
        add_grid(panel)
        lines, labels = panel.get_legend_handles_labels()
        named |= dict(zip(labels, lines, strict=True))
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize="small")
    figure.savefig(path, dpi=130)
