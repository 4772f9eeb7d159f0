"""The model card of a merged model: a plain transformers model, made of a recipient and organs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData

from not_hf.architecture.stack import task_of
from not_hf.cards.common import METHOD_TAGS, README, named_base, render, unite, updated
from not_hf.cards.donor import hub_datasets
from not_hf.cards.license import base_license, joint_license, organ_license
from not_hf.version import __version__

if TYPE_CHECKING:
    from not_hf.recipient.modeling import TransplantedForCausalLM


def merged_card(model: TransplantedForCausalLM, folder: str | os.PathLike[str], **hub_kwargs: Any) -> ModelCard:
    """The card of what `model.merge_and_unload()` is going to give. Nothing is written.

    Make it before the merge, after which the model no longer knows its organs; save it beside the merged model.

    Args:
        model: With the organs that are going to be merged.
        folder: Where the merged model is going to be saved. A `README.md` that is there is brought up to date.
        **hub_kwargs: For reading the recipient's card, which states its licence: `token`, `cache_dir`, …

    Raises:
        NotHFError: The metadata of the README.md that is there cannot be read.
    """
    surgery = model._surgery
    base, commit = surgery.base_config, surgery.base_revision
    organs = [organ for organ in surgery.organs.values() if organ.active]
    parts = unite(*map(named_base, [base.name_or_path, *(organ.repo for organ in organs)]))
    licenses = [base_license(base.name_or_path or "", revision=commit, **hub_kwargs)]
    licenses += [organ_license(organ.config, revision=organ.config.base_revision, **hub_kwargs) for organ in organs]
    data = ModelCardData(
        library_name="transformers",
        base_model=parts or None,
        base_model_relation="merge" if parts else None,
        pipeline_tag=task_of(base),
        tags=["merge", *METHOD_TAGS],
        datasets=unite(*(hub_datasets(organ.config) for organ in organs)) or None,
        **joint_license(licenses).metadata(),
    )
    card = render("merged_card.md", data, model=model, base=base, commit=commit, organs=organs, version=__version__)
    return updated(Path(folder, README), card)
