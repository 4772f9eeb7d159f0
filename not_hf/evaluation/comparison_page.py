"""A comparison of methods for people: its table, a page for a card, and a plot."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from not_hf.training.figure import add_grid, new_figure, scale_perplexities

Row = Mapping[str, Any]

_PACKAGES = ("not_hf", "torch", "transformers", "peft")


def table(rows: Sequence[Row]) -> list[dict[str, str]]:
    """Return the rows as they are shown: texts by the titles of their columns."""
    kinds = {"": "perplexity", "control_": "control perplexity"}
    shown = []
    for row in rows:
        is_base = row is rows[0]
        cells = {"method": row["method"], "scale": "–" if is_base else f"{row['scale']:g}"}
        for prefix, title in kinds.items():
            if f"{prefix}perplexity" in row:
                value, change = (f"{prefix}{name}" for name in ("perplexity", "perplexity_ratio"))
                cells[title] = _with_ends(row, value, f"{prefix}low", f"{prefix}high", "{:,.2f}".format)
                ends = (f"{prefix}ratio_low", f"{prefix}ratio_high")
                cells[f"{title}, change"] = "–" if is_base else _with_ends(row, change, *ends, _per_cent)
        columns = {
            **{"rate": (row["rate"], "g"), "steps": (row["steps"], ","), "training, s": (row["seconds"], ",.1f")},
            **{"memory, MB": (_mega(row["peak_bytes"]), ",.0f"), "file, MB": (_mega(row["saved_bytes"]), ",.1f")},
        }
        cells |= {title: "–" if value is None else format(value, form) for title, (value, form) in columns.items()}
        shown.append(cells)
    return shown


def page(rows: Sequence[Row], skipped: Sequence[Row], about: Mapping[str, Any], picture: str | None) -> str:
    """Write a comparison as Markdown, to be pasted into a card.

    Args:
        rows: Those of the comparison, like `skipped` and `about`.
        picture: Name of the file of the plot, if there is one.
    """
    shown, count = table(rows), about["num_tokens"]
    titles = list(shown[0])
    lines = [f"| {' | '.join(titles)} |", f"| --- |{' ---: |' * (len(titles) - 1)}"]
    lines += [f"| {' | '.join(each.values())} |" for each in shown]
    names = {"data": about.get("data"), "control": about.get("control")}
    texts = [f"{what} {name}" for what, name in names.items() if name]
    trained = [row["method"] for row in rows if row["steps"]]
    notes = []
    if trained:
        notes.append(
            f"{', '.join(trained)}: trained for the same time on {count['train']:,} tokens of the text, in blocks of "
            f"{about['block_length']}, {about['batch_size']} a step. Learning rates were not searched."
        )
    of_control = f" and {count['control']:,} of the control" if "control" in count else ""
    notes += [
        f"Measured on {count['test']:,} other tokens{of_control}, in blocks of the same length. The scale is the best "
        f"one on {count['choose']:,} tokens set aside. In brackets: 95 % intervals over blocks; those of a change are "
        "paired.",
        f"Memory is the peak of {'the process' if about['device'] == 'cpu' else 'the device'} in training. Seed "
        f"{about['seed']}; {about['device']}, {about['threads']} threads; "
        f"{', '.join(f'{name} {about[name]}' for name in _PACKAGES if name in about)}.",
        *(f"{each['method']} was left out: {each['reason']}." for each in skipped),
    ]
    heading = f"## {about['model'] or 'The model'}, fine-tuned in several ways"
    drawn = [f"![Perplexities at each scale]({picture})"] if picture else []
    subject = [f"Text: {'; '.join(texts)}."] if texts else []
    return "\n\n".join([heading, *subject, "\n".join(lines), *drawn, *notes]) + "\n"


def draw(rows: Sequence[Row], front: Sequence[Row], path: str | os.PathLike[str]) -> None:
    """Draw what `MethodComparison.plot` describes.

    Raises:
        NotHFError: matplotlib is not installed.
    """
    figure = new_figure(7, 4.5, "plot")
    axes = figure.subplots()
    base, *methods = rows
    has_control = "control_perplexity" in base
    key = "control_perplexity" if has_control else "scale"
    if has_control:
        axes.plot(base[key], base["perplexity"], color="black", marker="s", linestyle="none", label="base", zorder=3)
    else:
        axes.axhline(base["perplexity"], color="0.35", linestyle="--", linewidth=1, label="base")
    for n, row in enumerate(methods):
        points = [(each[key], each["perplexity"]) for each in front if each["method"] == row["method"]]
        axes.plot(*zip(*points, strict=True), color=f"C{n}", marker="o", markersize=4, linewidth=1.5)
        axes.plot(
            *(row[key], row["perplexity"]),
            color=f"C{n}",
            marker="*",
            markersize=13,
            linestyle="none",
            label=f"{row['method']}, best at scale {row['scale']:g}",
        )
    scale_perplexities(axes, [each["perplexity"] for each in (base, *front)])
    axes.set_xlabel("perplexity of the control" if has_control else "scale")
    axes.set_ylabel("perplexity of the domain")
    axes.legend(frameon=False, fontsize="small")
    add_grid(axes)
    figure.savefig(path, dpi=150)


def _with_ends(row: Row, key: str, low: str, high: str, write: Any) -> str:
    """Show a number and, if there is one, its interval."""
    ends = "" if math.isnan(row[low]) else f" ({write(row[low])} – {write(row[high])})"
    return f"{write(row[key])}{ends}"


def _per_cent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.1f} %"


def _mega(size: int | None) -> float | None:
    return None if size is None else size / 1e6
