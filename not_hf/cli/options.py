"""Arguments and options that several commands take, under one name and with one meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from not_hf.architecture.part_names import KEYWORDS, Modules

Donor = Annotated[str, typer.Argument(help="Donor: folder or Hub ID.", show_default=False)]
Model = Annotated[str, typer.Argument(help="Donor or model: folder or Hub ID.", show_default=False)]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write.", show_default=False)]
Force = Annotated[bool, typer.Option("--force", help="Write into the folder even if it is not empty.")]
Base = Annotated[
    str | None,
    typer.Option("--base", help="Recipient: folder or Hub ID.", show_default="the base the donor was cut from"),
]
Position = Annotated[
    int | None,
    typer.Option("--position", min=0, help="Place of the organ among the recipient's layers.", show_default=False),
]
Revision = Annotated[
    str | None, typer.Option("--revision", help="Branch, tag or commit on the Hub.", show_default="main")
]
Subfolder = Annotated[str | None, typer.Option("--subfolder", help="Folder within the repo.", show_default=False)]
Token = Annotated[str | None, typer.Option("--token", help="Hub token.", show_default="the stored one")]

Data = Annotated[
    str,
    typer.Option(
        "--data",
        help="Text: .txt, .md, .jsonl, .json, .parquet or .csv file, glob, folder, or Hub dataset ID.",
        show_default=False,
    ),
]
Column = Annotated[str, typer.Option("--column", help="Column that holds the text, in all files but plain text.")]
Split = Annotated[str, typer.Option("--split", help="Split, or slice of one: 'train[:90%]'.")]

SampleBy = Annotated[
    Literal["line", "paragraph", "document"] | None,
    typer.Option(
        "--sample-by",
        help="What a row of a plain text file is, which ends with EOS in training.",
        show_default="line, or paragraph where lines look wrapped",
    ),
]

Mode = Literal["insert", "replace"]
CutMode = Annotated[
    Mode, typer.Option("--mode", help="Insert the organ before layer `position`, or replace layers from there on.")
]
Init = Annotated[
    Literal["copy", "identity"],
    typer.Option("--init", help="Keep the layers as they are, or make an inserted organ start as an exact no-op."),
]
Parts = Annotated[
    str, typer.Option("--modules", help="all, outputs, attention, mlp, or names of modules: q_proj,v_proj.")
]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def parse_span(layers: str) -> tuple[int, int]:
    """Read `I:J` as two integers."""
    first, colon, last = layers.partition(":")
    try:
        if colon:
            return int(first), int(last)
    except ValueError:
        pass
    raise typer.BadParameter(f"{layers!r} is not a span I:J of two integers, such as 4:7", param_hint="--layers")


def parse_modules(modules: str) -> Modules:
    """Read a keyword, or names with commas between them."""
    return modules if modules in KEYWORDS else modules.split(",")


def given(**options: Any) -> dict[str, Any]:
    """Select the options that are not `None`."""
    return {key: value for key, value in options.items() if value is not None}
