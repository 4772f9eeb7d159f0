"""The command `import`."""

from __future__ import annotations

from typing import Annotated

import typer

from not_hf.cli.options import Dtype, Force, Init, Mode, Output, Position, Token
from not_hf.cli.organs import described, parse_span
from not_hf.cli.run import Result, command, facts, output_folder


@command("not-hf import donor_layers.pt openai-community/gpt2 --layers 4:7 -o imported", name="import")
def import_layers(
    checkpoint: Annotated[
        str, typer.Argument(help="The .pt file; or the folder or Hub ID that holds it.", show_default=False)
    ],
    base: Annotated[str, typer.Argument(help="Model whose layers they are: folder or Hub ID.", show_default=False)],
    output: Output,
    layers: Annotated[
        str | None,
        typer.Option("--layers", metavar="I:J", help="Half-open span.", show_default="as the file numbers them"),
    ] = None,
    subfolder: Annotated[str | None, typer.Option(help="Folder within the repo.", show_default=False)] = None,
    filename: Annotated[str, typer.Option(help="Name of the file in it.")] = "donor_layers.pt",
    position: Position = None,
    mode: Annotated[Mode, typer.Option(help="Put it before layer `position`, or in the place of layers.")] = "insert",
    init: Annotated[Init, typer.Option(help="Keep the layers, or make them start as an exact no-op.")] = "copy",
    domain: Annotated[str | None, typer.Option(help="What it was trained for, free text.", show_default=False)] = None,
    dtype: Annotated[Dtype, typer.Option(help="dtype of the organ; auto keeps the file's.")] = "auto",
    revision: Annotated[str | None, typer.Option(help="Of the checkpoint's repo.", show_default=False)] = None,
    base_revision: Annotated[str | None, typer.Option(help="Of the base's repo.", show_default=False)] = None,
    token: Token = None,
    force: Force = False,
) -> Result:
    """Turn layers saved with torch.save into an organ. Pickles that would run code are refused."""
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
            domain=domain,
            dtype=dtype,
            revision=revision,
            base_revision=base_revision,
            token=token,
        )
        donor.save_pretrained(output)
    data = described(donor, output)
    return Result(data, facts("Imported", data))
