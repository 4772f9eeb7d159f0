"""Arguments and options that several commands take, under one name and with one meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

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
    typer.Option("--position", min=0, help="Where the organ goes, in the recipient's own layers.", show_default=False),
]
Token = Annotated[str | None, typer.Option("--token", help="Hub token.", show_default="the stored one")]

Data = Annotated[
    str,
    typer.Option(
        "--data",
        help="Text: .txt, .md, .jsonl, .json, .parquet or .csv file, glob, folder, or Hub dataset ID.",
        show_default=False,
    ),
]
Column = Annotated[str, typer.Option("--column", help="Column that holds the text.")]
Split = Annotated[str, typer.Option("--split", help="Split, or slice of one: 'train[:90%]'.")]

Mode = Literal["insert", "replace"]
Init = Literal["copy", "identity"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
