"""A comparison of methods for people: its table, a page for a card, and a plot."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from not_hf.training.figure import add_grid, new_figure, scale_perplexities

Row = Mapping[str, Any]

_FEW = 20  # blocks, for a bootstrap
_PACKAGES = ("not_hf", "torch", "transformers", "peft")


def table(rows: Sequence[Row]) -> list[dict[str, str]]:
    """Return the rows as they are shown: texts by the titles of their columns."""
    kinds = {"": ("perplexity", "change"), "control_": ("control", "control, change")}
    shown = []
    for row in rows:
        is_base = row is rows[0]
        cells = {"method": row["method"], "scale": "–" if is_base else f"{row['scale']:g}"}
        for prefix, (title, change) in kinds.items():
            if f"{prefix}perplexity" in row:
                value, low, high = (row[f"{prefix}{name}"] for name in ("perplexity", "low", "high"))
                ratios = (row[f"{prefix}{name}"] for name in ("perplexity_ratio", "ratio_low", "ratio_high"))
                percent, least, most = (100 * (ratio - 1) for ratio in ratios)
                cells[title] = f"{value:,.2f}{_interval(low, high, ',.2f')}"
                cells[change] = "–" if is_base else f"{percent:+.1f} %{_interval(least, most, '+.1f')}"
        columns = {
            **{"steps": (row["steps"], ","), "seconds": (row["seconds"], ",.1f")},
            **{"memory, MB": (_mega(row["peak_bytes"]), ",.0f"), "file, MB": (_mega(row["saved_bytes"]), ",.1f")},
        }
        cells |= {title: "–" if value is None else format(value, form) for title, (value, form) in columns.items()}
        shown.append(cells)
    return shown


def remarks(skipped: Sequence[Row], about: Mapping[str, Any]) -> list[str]:
    """Say what was left out, and whether too little was measured."""
    found = [f"{each['method']} was left out: {each['reason']}." for each in skipped]
    measured = min(count for part, count in about["num_tokens"].items() if part in ("test", "control"))
    if (num_blocks := measured // (about["block_length"] - 1)) < _FEW:
        found.append(f"Intervals over {num_blocks} blocks are too narrow; give a larger budget, or more text.")
    return found


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
    names = {"Text": about.get("data"), "Control": about.get("control")}
    subject = ". ".join(f"{what}: {name}" for what, name in names.items() if name)
    rates = [f"{row['method']} {row['rate']:g}" for row in rows if row["rate"]]
    notes = []
    if rates:
        notes.append(
            f"Trained for the same time on blocks of {about['block_length']} tokens, {about['batch_size']} a step, "
            f"from {count['train']:,} tokens of the text. Peak learning rates, not searched: {', '.join(rates)}."
        )
    of_control = f" and {count['control']:,} of the control" if "control" in count else ""
    notes += [
        f"Perplexity is measured on {count['test']:,} other tokens{of_control}, in blocks of that length. The change "
        "is from the base. In brackets are 95 % intervals over blocks; those of the change are paired. The scale is "
        f"the best one on {count['choose']:,} tokens set aside.",
        f"Memory is the peak of {'the process' if about['device'] == 'cpu' else 'the device'} in training. Seed "
        f"{about['seed']}; {about['device']}, {about['threads']} threads; "
        f"{', '.join(f'{name} {about[name]}' for name in _PACKAGES if name in about)}.",
        *remarks(skipped, about),
    ]
    heading = f"## {about['model'] or 'The model'}, fine-tuned in several ways"
    drawn = [f"![Perplexities at each scale]({picture})"] if picture else []
    return "\n\n".join([heading, *([f"{subject}."] if subject else []), "\n".join(lines), *drawn, *notes]) + "\n"


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
            label=f"{row['method']} (star: scale {row['scale']:g})",
        )
    scale_perplexities(axes, [each["perplexity"] for each in (base, *front)])
    axes.set_xlabel("perplexity of the control" if has_control else "scale")
    axes.set_ylabel("perplexity of the domain")
    axes.legend(frameon=False, fontsize="small")
    add_grid(axes)
    figure.savefig(path, dpi=150)


def _interval(low: float, high: float, form: str) -> str:
    """Show an interval, if there is one."""
    return "" if math.isnan(low) else f" ({low:{form}} – {high:{form}})"


def _mega(size: int | None) -> float | None:
    return None if size is None else size / 1e6
