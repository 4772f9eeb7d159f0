"""The model card of a merged model, which is a plain transformers model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData

from not_hf.cards.common import METHOD_TAGS, README, TASKS, named_base, render, unite, updated
from not_hf.cards.donor import hub_datasets
from not_hf.cards.license import base_license, joint_license, organ_license
from not_hf.version import __version__

if TYPE_CHECKING:
    from not_hf.recipient.modeling import Transplanted


def merged_card(model: Transplanted, folder: str | os.PathLike[str], **hub_kwargs: Any) -> ModelCard:
    """Make the card of a merged model. Call it before `merge_and_unload()`, which discards what the card lists.

    Args:
        model: A model whose active organs are to be merged.
        folder: Folder for the merged model. A `README.md` in it is updated; nothing is written.
        **hub_kwargs: For reading licences from cards: `token`, `cache_dir`, …

    Raises:
        NotHFError: The metadata of the `README.md` in the folder cannot be read.

    Examples:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from not_hf import DonorModel, TransplantedForCausalLM, merged_card
        >>> base = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=4, n_head=2))
        >>> model = TransplantedForCausalLM.from_pretrained(base, DonorModel.from_base(base, layers=(1, 3)))
        >>> card = merged_card(model, "merged")
        >>> native = model.merge_and_unload()
        >>> card.data.library_name, card.data.tags[0]
        ('transformers', 'merge')
    """
    surgery = model._surgery
    base, commit = surgery.base_config, surgery.base_revision
    organs = [organ for organ in surgery.organs.values() if organ.active]
    auto_class = model.native_auto_class.__name__
    parts = unite(*map(named_base, [base.name_or_path, *(organ.repo for organ in organs)]))
    licenses = [base_license(base.name_or_path or "", revision=commit, **hub_kwargs)]
    licenses += [organ_license(organ.config, revision=organ.config.base_revision, **hub_kwargs) for organ in organs]
    data = ModelCardData(
        library_name="transformers",
        base_model=parts or None,
        base_model_relation="merge" if parts else None,
        pipeline_tag=TASKS[auto_class],
        tags=["merge", *METHOD_TAGS],
        datasets=unite(*(hub_datasets(organ.config) for organ in organs)) or None,
        **joint_license(licenses).metadata(),
    )
    facts: dict[str, Any] = {"model": model, "auto_class": auto_class, "base": base, "commit": commit}
    card = render("merged_card.md", data, organs=organs, version=__version__, **facts)
    return updated(Path(folder, README), card)
