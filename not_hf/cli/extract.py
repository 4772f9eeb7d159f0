"""`not-hf extract`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from not_hf.cli.app import Result, command, facts, output_folder
from not_hf.cli.options import (
    CutMode,
    Dtype,
    Force,
    Init,
    Output,
    Parts,
    Position,
    Revision,
    Subfolder,
    Token,
    given,
    parse_modules,
    parse_span,
)

if TYPE_CHECKING:
    from not_hf import DonorModel


@command("not-hf extract openai-community/gpt2 --layers 4:7 --init identity -o organ")
def extract(
    base: Annotated[str, typer.Argument(help="Model to cut from: folder or Hub ID.", show_default=False)],
    layers: Annotated[
        str, typer.Option("--layers", metavar="I:J", help="Half-open span: 4:7 is layers 4, 5, 6.", show_default=False)
    ],
    output: Output,
    position: Position = None,
    mode: CutMode = "insert",
    init: Init = "copy",
    modules: Parts = "all",
    revision: Revision = None,
    subfolder: Subfolder = None,
    dtype: Annotated[Dtype, typer.Option(help="dtype of the donor; auto is the base's.")] = "auto",
    license: Annotated[
        str | None, typer.Option(help="Licence of the donor, as the Hub names it.", show_default="the base's")
    ] = None,
    base_name: Annotated[
        str | None,
        typer.Option(help="Hub ID of the base, if it is read from a copy.", show_default="where it is read from"),
    ] = None,
    token: Token = None,
    force: Force = False,
) -> Result:
    """Cut a donor out of a causal LM. Only the bytes of its layers are read."""
    span = parse_span(layers)
    hub = given(revision=revision, subfolder=subfolder, token=token)
    with output_folder(output, force):
        from not_hf import DonorModel

        options: dict[str, Any] = {"modules": parse_modules(modules), "dtype": dtype, "license": license}
        donor = DonorModel.from_base(base, span, position, mode, init, **options, **hub)
        if base_name is not None:
            donor.config.base_model_name_or_path = base_name
            donor.config.base_revision = donor.config.base_subfolder = None  # the copy's
        donor.save_pretrained(output)
    data = describe_donor(donor, output)
    return Result(data, facts("Cut", data))


def describe_donor(donor: DonorModel, folder: Path) -> dict[str, Any]:
    """List what is worth knowing of a donor that was just written."""
    config = donor.config
    return {
        "folder": str(folder),
        "base": config.base_model_name_or_path,
        "base_revision": config.base_revision,
        "layers": config.layers,
        "position": config.position,
        "mode": config.mode,
        "init": config.init,
        "modules": config.modules,
        "license": config.license,
        "num_parameters": donor.num_parameters(),
        "dtype": str(donor.dtype).removeprefix("torch."),
    }
