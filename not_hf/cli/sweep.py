"""`not-hf sweep`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from not_hf.cli.app import SWEEP, Result, command, output_folder, saying_how_to_resume
from not_hf.cli.loading import load_model
from not_hf.cli.options import Column, Data, Donor, Force, Model, Output, SampleBy, Split
from not_hf.errors import NotHFError

_MODES = ("insert", "replace")


@command("not-hf sweep openai-community/gpt2 organ --data held-out.txt -o positions")
def sweep(
    model: Model,
    donor: Donor,
    data: Data,
    output: Output,
    positions: Annotated[
        str | None, typer.Option(help="Positions: '0,4,8'.", show_default="all that the organ fits")
    ] = None,
    modes: Annotated[str, typer.Option(help="insert, replace, or 'insert,replace'.")] = "insert",
    column: Column = "text",
    split: Split = "train",
    sample_by: SampleBy = None,
    resume: Annotated[bool, typer.Option("--resume", help="Measure what an interrupted sweep has not.")] = False,
    force: Force = False,
) -> Result:
    """Measure perplexity on text with an organ at every position of a model, and write sweep.json and a plot.

    The rows of the text are scored as one stream.
    """
    wanted = None if positions is None else _positions(positions)
    chosen = [mode.strip() for mode in modes.split(",")]
    if not set(chosen) <= set(_MODES):
        raise typer.BadParameter(f"{modes!r} is not insert, replace, or both with a comma", param_hint="--modes")
    if (output / SWEEP).exists() and not (force or resume):
        raise NotHFError(
            f"{output} holds a sweep; measure what it lacks with --resume, choose another --output, "
            "or start over with --force"
        )
    with (
        output_folder(output, force or resume),
        saying_how_to_resume(lambda: _how_to_resume(output)),
        contextlib.nullcontext() if resume else _setting_aside(output / SWEEP),
    ):
        from not_hf import load_text, sweep_positions

        texts = load_text(data, split=split, column=column, sample_by=sample_by)["text"]
        loaded, tokenizer = load_model(model, None)
        found = sweep_positions(
            loaded,
            donor,
            texts,
            wanted,
            chosen,
            tokenizer=tokenizer,
            folder=output,
            add_start_token=tokenizer.bos_token is not None,
            batch_size=1 if loaded.device.type == "cpu" else 16,  # as in eval
        )
        found.save(output)
        if find_spec("matplotlib"):
            found.plot(output / "sweep.png")
    table = Table("mode", "position", "perplexity", "95 % interval", title=f"{donor} in {model}", title_justify="left")
    for row in ({"mode": "without the organ", "position": "", **found.base}, *found.rows):
        ends = f"{row['low']:,.3f} – {row['high']:,.3f}"
        mark = " (best)" if row is found.best else ""
        table.add_row(str(row["mode"]), str(row["position"]), f"{row['perplexity']:,.3f}{mark}", ends)
    for place in found.skipped:
        table.add_row(place["mode"], str(place["position"]), "does not fit", place["reason"])
    document = {
        **{"folder": str(output), "model": model, "donor": donor, "data": data, "num_tokens": found.num_tokens},
        **{"base": found.base, "best": found.best, "rows": found.rows, "skipped": found.skipped},
    }
    return Result(document, table)


@contextlib.contextmanager
def _setting_aside(record: Path) -> Iterator[None]:
    """Start without the record of an earlier sweep, which comes back if the block fails before it writes another."""
    aside = record.with_name(f".{record.name}.earlier")
    if record.exists():
        record.replace(aside)
    try:
        yield
    finally:
        if record.exists():
            aside.unlink(missing_ok=True)
        elif aside.exists():
            aside.replace(record)


def _how_to_resume(output: Path) -> list[str]:
    """Say after Ctrl-C how to go on."""
    if not (output / SWEEP).exists():
        return []
    return [f"interrupted; {output} holds what was measured. Add --resume to measure the rest"]


def _positions(text: str) -> list[int]:
    """Read integers with commas between them."""
    try:
        return [int(each) for each in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not a list of integers, such as 0,4,8", param_hint="--positions"
        ) from None
