"""Write the folder of a donor: tensors, config, card and tokenizer, all or nothing."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Mapping
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from not_hf.architecture.layers import computes, is_finite
from not_hf.cards.common import README
from not_hf.cards.donor import updated_card
from not_hf.config import DELTA
from not_hf.donor.delta import Delta, write_delta
from not_hf.donor.loading import refuse
from not_hf.donor.saved_modules import is_saved, saved_problems
from not_hf.donor.stripped import StrippedModel
from not_hf.donor.tokenizer import save_local_tokenizer
from not_hf.errors import CorruptDonorError, NotHFError
from not_hf.hub.atomic_write import full_disk_is_oserror, replacing, require_donor_folder
from not_hf.hub.checkpoint import file_names, open_checkpoint
from not_hf.hub.consistent_read import saved_digests
from not_hf.hub.digest import digest


def write_donor(
    donor: StrippedModel,
    folder: str | os.PathLike[str],
    is_main_process: bool = True,
    tensors: Mapping[str, torch.Tensor] | None = None,
    repo_id: str | None = None,
    draft: str | None = None,
    generation_config: GenerationConfig | None = None,
    delta: Delta | None = None,
    token: bool | str | None = None,
    dtype: str | torch.dtype | None = None,
    **kwargs: Any,
) -> dict[str, str] | None:
    """Write the folder of a donor, with the digest of its tensors in the config.

    Args:
        donor: Gives the config and the layout of the tensors.
        folder: Folder; created if missing.
        is_main_process: Whether this process writes files.
        tensors: Tensors to save instead of the donor's own.
        repo_id: The donor's repo, for the card.
        draft: Folder to write to instead, without a tokenizer; the caller moves it to `folder`.
        generation_config: Also saved, if given.
        delta: How to store a change of the base's layers, from `plan_delta`.
        token: Of the Hub, to read them.
        dtype: dtype of the files, or its name; `None`: that of the tensors.
        **kwargs: For `PreTrainedModel.save_pretrained`.

    Returns:
        The digests in the config that was written, if any.

    Raises:
        CorruptDonorError: A tensor is missing, empty, on the meta device or not finite; nothing is written.
        NotHFError: Tensors have other names than the donor's, the folder holds another model, a delta cannot be made,
            or there is no such dtype.
        OSError: The folder cannot be written, or the base not read; the folder is as it was.
    """
    dtype = require_dtype(dtype)
    own = donor.state_dict()
    tensors = own if tensors is None else tensors
    if is_main_process and (other := sorted(tensors.keys() ^ own.keys())):
        raise NotHFError(
            f"state_dict does not hold the donor's tensors by their names ({other[0]}, …); take it from the unwrapped "
            "donor, or leave it out"
        )
    if dtype is not None:
        tensors = {name: tensor.to(dtype) if computes(tensor) else tensor for name, tensor in tensors.items()}
    beside = {name: tensor for name, tensor in tensors.items() if is_saved(name)}
    refuse(f"cannot save to {folder}", saved_problems(donor.config, beside))
    if hollow := [name for name, tensor in tensors.items() if tensor.numel() == 0 or tensor.is_meta]:
        raise CorruptDonorError(f"cannot save tensors that are empty or on the meta device: {', '.join(hollow[:5])}")
    if broken := [name for name, tensor in tensors.items() if not is_finite(tensor)]:
        raise CorruptDonorError(
            f"cannot save tensors with NaN or infinity: {', '.join(broken[:5])}; check whether training diverged"
        )
    require_donor_folder(folder)
    if delta is not None and (variant := kwargs.get("variant")):
        raise NotHFError(f"a delta is not a variant of the whole tensors; leave out variant={variant!r}, or delta")
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    num_parameters = sum(tensor.numel() for tensor in tensors.values())
    stale = () if generation_config else (GENERATION_CONFIG_NAME,)  # another donor's, which a load would use for this
    with contextlib.nullcontext(draft) if draft else replacing(folder, is_main_process, stale) as place:
        with full_disk_is_oserror(folder):
            PreTrainedModel.save_pretrained(donor, place, is_main_process, dict(tensors), **kwargs)
        if not is_main_process:
            return None
        config = copy.copy(donor.config)
        config.delta, config.dtype = None, dtype or config.dtype
        if delta is not None:
            config.delta, size = write_delta(place, delta, config, token=token)
        config.digests = digests_of(folder, place, kwargs.get("variant") or config.weights_variant)
        card = updated_card(folder, config, num_parameters, size, repo_id)
        config.save_pretrained(place)
        card.save(os.path.join(place, README))
        if generation_config is not None:
            save_generation_config(generation_config, place)
        if draft is None:
            save_local_tokenizer(config, folder, place)
    return config.digests


def require_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Return the dtype of files, which may be given by its name, as to transformers.

    Raises:
        NotHFError: It is no dtype of floating-point values.
    """
    found = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if found is None or (isinstance(found, torch.dtype) and found.is_floating_point):
        return found
    raise NotHFError(f"dtype must be a floating-point one or its name, such as 'float16', got {dtype!r:.100}")


def save_generation_config(config: GenerationConfig, folder: str | os.PathLike[str]) -> None:
    """Save `generation_config.json`, also one that `GenerationConfig.save_pretrained` refuses as inconsistent."""
    config.to_json_file(os.path.join(folder, GENERATION_CONFIG_NAME))


def digests_of(
    folder: str | os.PathLike[str], draft: str | os.PathLike[str], variant: str | None
) -> dict[str, str] | None:
    """Compute the digest of the tensors in a draft; the digests of other variants in `folder` stay."""
    replaced = {file_names(each)[0] for each in ((None, DELTA) if variant in (None, DELTA) else (variant,))}
    saved = saved_digests(folder) or {}
    found = {key: value for key, value in saved.items() if key not in replaced and "/" not in key}
    file = file_names(variant)[0]
    if any(name.endswith(".safetensors") for name in os.listdir(draft)):  # not as distributed checkpoint
        found[file] = digest(open_checkpoint(draft, variant=variant))
    return found or None
