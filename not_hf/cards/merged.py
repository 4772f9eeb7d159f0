"""The model card of a merged model: a plain transformers model, made of a recipient and organs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData

from not_hf.architecture.stack import task_of
from not_hf.cards.common import METHOD_TAGS, README, cell, linked, named_base, short_name, unite, updated
from not_hf.cards.donor import hub_datasets
from not_hf.cards.license import base_license, joint_license, organ_license
from not_hf.version import __version__

if TYPE_CHECKING:
    from not_hf.recipient.modeling import TransplantedForCausalLM
    from not_hf.recipient.organ import Organ

_TEMPLATE = Path(__file__).parent / "templates" / "merged_card.md"


def merged_card(model: TransplantedForCausalLM, folder: str | os.PathLike[str], **hub_kwargs: Any) -> ModelCard:
    """The card of what `model.merge_and_unload()` is going to give. Nothing is written.

    Make it before the merge, after which the model knows its organs no longer; save it beside the merged model.

    Args:
        model: With the organs that are going to be merged.
        folder: Where the merged model is going to be saved. A `README.md` that is there is brought up to date.
        **hub_kwargs: How the recipient's card, which states its licence, is reached: `token`, `cache_dir`, …

    Raises:
        NotHFError: The metadata of the README.md that is there cannot be read.
    """
    surgery = model._surgery
    base, commit = surgery.base_config, surgery.base_revision
    organs = {name: organ for name, organ in surgery.organs.items() if organ.active}
    configs = [organ.config for organ in organs.values()]
    parts = unite(*map(named_base, [base.name_or_path, *(organ.repo for organ in organs.values())]))
    licenses = [base_license(base.name_or_path or "", revision=commit, **hub_kwargs)]
    licenses += [organ_license(config, revision=config.base_revision, **hub_kwargs) for config in configs]
    data = ModelCardData(
        library_name="transformers",
        base_model=parts or None,
        base_model_relation="merge" if parts else None,
        pipeline_tag=task_of(base),
        tags=["merge", *METHOD_TAGS],
        datasets=unite(*map(hub_datasets, configs)) or None,
        **joint_license(licenses).metadata(),
    )
    facts = {
        "Recipient": linked(base.name_or_path) + (f" at `{commit}`" if commit else ""),
        "Architecture": type(model).__name__,
        "Layers": f"{model.config.num_hidden_layers}; the recipient has {base.num_hidden_layers}",
        "Parameters": f"{model.num_parameters():,}",
        "Merged with": f"not_hf {__version__}",
    }
    card = ModelCard.from_template(
        data,
        template_path=str(_TEMPLATE),
        title=f"{short_name(base.name_or_path)}-merged",
        recipient=linked(base.name_or_path),
        facts=facts,
        organs=[_row(name, organ) for name, organ in organs.items()],
    )
    return updated(Path(folder, README), card)


def _row(name: str, organ: Organ) -> list[str]:
    """One organ in the card's table: what it is called, where it came from, where it went."""
    config = organ.config
    i, j = config.span
    return [
        cell(name),
        linked(organ.repo) if organ.repo else "–",
        f"`{organ.revision}`" if organ.revision else "–",
        f"`[{i}, {j})` of {linked(config.base_model_name_or_path)}",
        str(config.position),
        f"`{config.mode}`",
    ]
