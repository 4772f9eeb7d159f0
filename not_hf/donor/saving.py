"""Writing a donor's folder: tensors, config, card and tokenizer, all of them or nothing."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from not_hf.architecture.layers import is_finite
from not_hf.cards.common import README
from not_hf.cards.donor import updated_card
from not_hf.donor.stripped import StrippedModel
from not_hf.donor.tokenizer import save_local_tokenizer
from not_hf.errors import CorruptDonorError
from not_hf.hub.atomic_write import replacing, require_donor_folder


def write_donor(
    donor: StrippedModel,
    folder: str | os.PathLike[str],
    is_main_process: bool = True,
    tensors: Mapping[str, torch.Tensor] | None = None,
    repo_id: str | None = None,
    draft: str | None = None,
    **kwargs: Any,
) -> None:
    """Write a donor's folder.

    Args:
        donor: Its config, and the layout its tensors are saved in.
        folder: Created when missing.
        is_main_process: Write on this process.
        tensors: Tensors to save instead of the donor's own, by their names.
        repo_id: Where the card says the donor lies.
        draft: Write there, for the caller to move to `folder`, which has a tokenizer if it needs one.
        **kwargs: For `PreTrainedModel.save_pretrained`.

    Raises:
        CorruptDonorError: A tensor is empty, not materialized or not finite; nothing is written then.
        NotHFError: The folder holds another model.
    """
    tensors = donor.state_dict() if tensors is None else tensors
    hollow = [name for name, tensor in tensors.items() if tensor.numel() == 0 or tensor.is_meta]
    if hollow:
        raise CorruptDonorError(f"refusing to save empty or unmaterialized tensors: {', '.join(hollow[:5])}")
    if broken := [name for name, tensor in tensors.items() if not is_finite(tensor)]:
        raise CorruptDonorError(
            f"refusing to save NaN or infinity, which no load takes: {', '.join(broken[:5])}; did it diverge?"
        )
    require_donor_folder(folder)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    num_parameters = sum(tensor.numel() for tensor in tensors.values())
    card = updated_card(folder, donor.config, num_parameters, size, repo_id)  # raises before anything is written
    with contextlib.nullcontext(draft) if draft else replacing(folder) as place:
        PreTrainedModel.save_pretrained(donor, place, is_main_process, dict(tensors), **kwargs)
        if not is_main_process:
            return
        card.save(os.path.join(place, README))
        if draft is None:
            save_local_tokenizer(donor.config.base_model_name_or_path, folder, place)
