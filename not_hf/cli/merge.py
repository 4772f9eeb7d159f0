"""`not-hf merge`."""

from __future__ import annotations

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
    """Merge an organ into its recipient: a native model with tokenizer and card, which loads without not_hf."""
    from transformers import AutoTokenizer

    from not_hf import TransplantedForCausalLM, merged_card

    with output_folder(output, force):
        model = TransplantedForCausalLM.from_pretrained(*((base, donor) if base else (donor,)))
        card = merged_card(model, output)
        native = model.merge_and_unload()
        native.save_pretrained(output, max_shard_size=max_shard_size)
        AutoTokenizer.from_pretrained(base or donor).save_pretrained(output)
        card.save(output / "README.md")
    data = {
        "folder": str(output),
        "architecture": type(native).__name__,
        "num_layers": native.config.num_hidden_layers,
        "num_parameters": native.num_parameters(),
    }
    return Result(data, facts("Merged", data))
