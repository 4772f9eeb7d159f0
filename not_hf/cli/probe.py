"""`not-hf probe`."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from not_hf.cli.app import Result, command, output_folder
from not_hf.cli.options import Base, Column, Force, Model, SampleBy, Split, given


@command("not-hf probe gpt2-kjv --members kjv.txt --non-members held-out.txt -o privacy")
def probe(
    model: Model,
    members: Annotated[
        str, typer.Option(help="Text that was trained on: file, glob, folder, or Hub dataset ID.", show_default=False)
    ],
    non_members: Annotated[
        str, typer.Option(help="Text that was not, best of the same documents; 100 rows or more.", show_default=False)
    ],
    canaries: Annotated[
        Path | None,
        typer.Option(help="Secrets in the members: file that plant_canaries wrote.", show_default=False),
    ] = None,
    base: Base = None,
    recipient: Annotated[
        list[str] | None,
        typer.Option(help="Other recipient to put the organ into: folder or Hub ID. May be repeated."),
    ] = None,
    random_layers: Annotated[
        bool, typer.Option("--random-layers", help="Also give the recipient's own layers random weights.")
    ] = False,
    reference: Annotated[
        str | None,
        typer.Option(
            help="Model that was not trained on the members: folder or Hub ID.",
            show_default="the model without the organ",
        ),
    ] = None,
    num_rows: Annotated[int, typer.Option(min=1, help="Rows of each text that are measured, at most.")] = 1000,
    prefix_length: Annotated[int, typer.Option(min=1, help="Tokens of a row from which decoding goes on.")] = 32,
    column: Column = "text",
    split: Split = "train",
    sample_by: SampleBy = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for probe.json and probe.md.", show_default=False),
    ] = None,
    force: Force = False,
) -> Result:
    """Measure what an organ gives away of the rows that it was trained on.

    Attacks guess which rows were trained on, and ask for what rows and planted secrets say. In brackets are 95 %
    intervals. Low numbers do not show that an organ is private: these are simple attacks.
    """
    with contextlib.nullcontext() if output is None else output_folder(output, force):
        from not_hf import load_text, probe_privacy
        from not_hf.evaluation.compared_methods import numbered, public_name
        from not_hf.evaluation.privacy_findings import ATTACKS, LIMITS, area, other_findings, percent, rows_finding

        texts = [
            load_text(source, split=split, column=column, sample_by=sample_by)["text"]
            for source in (members, non_members)
        ]
        others = recipient or []
        found = probe_privacy(
            model,
            *texts,
            **given(base=base, reference=reference, canaries=canaries),
            recipients=dict(zip(numbered([*map(public_name, others)]), others, strict=True)),
            with_random_layers=random_layers,
            num_rows=num_rows,
            prefix_length=prefix_length,
        )
        if output is not None:
            found.save(output)
    lines = [rows_finding(found.about), *other_findings(found.attacks, found.extraction, found.canaries), LIMITS]
    view = Table("recipient", "attack", "AUC", "found at 1 % false positives", title=model, title_justify="left")
    view.caption, view.caption_justify = "\n".join(lines), "left"
    for row in found.attacks:
        view.add_row(row["recipient"], ATTACKS[row["attack"]], area(row), percent(row, "tpr"))
    names = {"members": members, "non_members": non_members}
    return Result({"folder": output and str(output), **names, **found.to_dict(), "model": model}, view)
