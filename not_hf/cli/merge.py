"""`not-hf merge`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from not_hf.cli.app import Result, command, facts, output_folder
from not_hf.cli.options import Base, Donor, Force, Output


@command("not-hf merge gpt2-kjv -o gpt2-kjv-merged")
def merge(
    donor: Donor,
    output: Output,
    base: Base = None,
    max_shard_size: Annotated[str, typer.Option(help="Larger weights are split into files of this size.")] = "5GB",
    force: Force = False,
) -> Result:
    """Merge an organ into its recipient: a native model with tokenizer and card, which loads without not_hf.

    Tensors are copied from file to file, so the model need not fit in memory; if it must be built after all, a line
    says why.
    """
    from not_hf import merge_donor

    with output_folder(output, force):
        merged = merge_donor(donor, output, base, max_shard_size)
    data = asdict(merged)
    return Result(data, facts("Merged", data))
