"""`not-hf compare`."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from not_hf.cli.app import Result, command, output_folder
from not_hf.cli.options import Column, Data, Force, SampleBy, Split

_UNITS = {"s": 1, "m": 60, "h": 3600}


@command("not-hf compare openai-community/gpt2 --data kjv.txt --control general.txt --budget 10m -o compared")
def compare(
    base: Annotated[str, typer.Argument(help="Model: folder or Hub ID.", show_default=False)],
    data: Data,
    control: Annotated[
        str | None, typer.Option(help="General text, as --data, to measure forgetting.", show_default=False)
    ] = None,
    budget: Annotated[str, typer.Option(help="Time for everything, about: 90s, 10m, 2h.")] = "10m",
    donor: Annotated[
        list[str] | None,
        typer.Option(help="Donor to measure as it is: folder or Hub ID. May be repeated.", show_default=False),
    ] = None,
    full: Annotated[
        bool, typer.Option("--full/--no-full", help="Train all weights too, at 16 bytes of memory for each.")
    ] = True,
    column: Column = "text",
    split: Split = "train",
    sample_by: SampleBy = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for compare.json, compare.png, compare.md.", show_default=False),
    ] = None,
    force: Force = False,
) -> Result:
    """Train an organ, LoRA and all weights on text for the same time, and measure what each gains and costs.

    A part of the text is held out: one tenth to choose a scale by, two tenths to test with. In brackets are 95 %
    intervals. Learning rates are not searched.
    """
    seconds = _seconds(budget)
    with contextlib.nullcontext() if output is None else output_folder(output, force):
        from not_hf import compare_methods, load_text
        from not_hf.evaluation.compared_methods import public_name
        from not_hf.evaluation.comparison_page import remarks, table
        from not_hf.evaluation.method_comparison import FULL, RATES

        texts = load_text(data, split=split, column=column, sample_by=sample_by)["text"]
        general = control and load_text(control, column=column, sample_by=sample_by)["text"]
        rates = {name: rate for name, rate in RATES.items() if full or name != FULL}
        found = compare_methods(base, texts, general, budget=seconds, donors=donor or [], rates=rates)
        names = {"data": public_name(data), "control": control and public_name(control)}
        found = dataclasses.replace(found, about=found.about | names)
        if output is not None:
            found.save(output)
    shown = table(found.rows)
    caption = "\n".join(remarks(found.skipped, found.about))
    view = Table(*shown[0], title=f"{base} on {data}", title_justify="left", caption=caption, caption_justify="left")
    for row in shown:
        view.add_row(*row.values())
    document = {
        **{"folder": output and str(output), **found.about, "model": base, "data": data, "control": control},
        **{"rows": found.rows, "front": found.front, "skipped": found.skipped},
    }
    return Result(document, view)


def _seconds(text: str) -> float:
    """Read a time such as 90s, 10m or 2h."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if match is None or float(match[1]) == 0:
        raise typer.BadParameter(f"{text!r} is not a time above 0, such as 90s, 10m or 2h", param_hint="--budget")
    return float(match[1]) * _UNITS[match[2]]
