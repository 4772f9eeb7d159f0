"""`not-hf import`; the underscore is there because `import` is a Python keyword."""

from __future__ import annotations

from typing import Annotated

import typer

from not_hf.cli.app import Result, command, facts, output_folder
from not_hf.cli.extract import describe_donor
from not_hf.cli.options import (
    CutMode,
    Dtype,
    Force,
    Init,
    Output,
    Parts,
    Position,
    Subfolder,
    Token,
    parse_modules,
    parse_span,
)


@command("not-hf import donor_layers.pt openai-community/gpt2 --layers 4:7 -o imported", name="import")
def import_(
    checkpoint: Annotated[
        str, typer.Argument(help="The .pt file, or the folder or Hub ID that holds it.", show_default=False)
    ],
    base: Annotated[
        str, typer.Argument(help="Model that the layers were cut from: folder or Hub ID.", show_default=False)
    ],
    output: Output,
    layers: Annotated[
        str | None,
        typer.Option("--layers", metavar="I:J", help="Half-open span.", show_default="as numbered in the file"),
    ] = None,
    subfolder: Subfolder = None,
    filename: Annotated[str, typer.Option(help="Name of the file in the folder or repo.")] = "donor_layers.pt",
    position: Position = None,
    mode: CutMode = "insert",
    init: Init = "copy",
    modules: Parts = "all",
    domain: Annotated[
        str | None, typer.Option(help="What it was trained on, for the card.", show_default=False)
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="dtype of the donor; auto is the file's.")] = "auto",
    revision: Annotated[str | None, typer.Option(help="Of the checkpoint's repo.", show_default="main")] = None,
    base_revision: Annotated[str | None, typer.Option(help="Of the base's repo.", show_default="main")] = None,
    token: Token = None,
    force: Force = False,
) -> Result:
    """Turn layers saved with torch.save into a donor. Pickles that would run code are refused."""
    span = parse_span(layers) if layers else None
    with output_folder(output, force):
        from not_hf import import_checkpoint

        donor = import_checkpoint(
            checkpoint,
            base,
            span,
            subfolder,
            filename,
            position=position,
            mode=mode,
            init=init,
            modules=parse_modules(modules),
            domain=domain,
            dtype=dtype,
            revision=revision,
            base_revision=base_revision,
            token=token,
        )
        donor.save_pretrained(output)
    data = describe_donor(donor, output)
    return Result(data, facts("Imported", data))
