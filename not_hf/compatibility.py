"""`check_compatibility`: does a donor fit a recipient? Answered from configs alone, every mismatch in one go."""

from __future__ import annotations

import os
from typing import Any

from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from not_hf.anatomy import find_stack, meta_twin, spliced_config
from not_hf.config import DonorConfig
from not_hf.donor import DonorModel
from not_hf.errors import IncompatibleDonorError, UnsupportedArchitectureError

# What the recipient computes once for all its layers, or allocates in its caches: an organ must agree on it.
SHARED_GEOMETRY = (
    "is_decoder",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rope_parameters",
    "rotary_dim",
    "alibi",
    "window_size",
)

DonorLike = str | os.PathLike[str] | DonorConfig | DonorModel
RecipientLike = str | os.PathLike[str] | PreTrainedConfig | PreTrainedModel


def check_compatibility(
    donor: DonorLike,
    recipient: RecipientLike,
    position: int | None = None,
    mode: str | None = None,
    **hub_kwargs: Any,
) -> list[str]:
    """List everything that keeps a donor from fitting a recipient. No weights are read.

    Args:
        donor: Donor model, config, folder or Hub ID.
        recipient: Recipient model, native config, folder or Hub ID.
        position: Where the organ is to go, in the recipient's own layers; `None`: as the donor says.
        mode: `"insert"` or `"replace"`; `None`: as the donor says.
        **hub_kwargs: `token`, `cache_dir`, `local_files_only`, … for what is read from the Hub.

    Returns:
        One line per mismatch; an empty list when the organ fits.

    Raises:
        CorruptDonorError: The donor's config contradicts itself.
        OSError: A config cannot be read.
    """
    donor_config = _donor_config(donor, hub_kwargs)
    donor_config.check()
    organ = donor_config.native_config()
    config = _recipient_config(recipient, hub_kwargs)
    name = config.name_or_path or "the recipient"
    mode = mode or donor_config.mode
    position = donor_config.position if position is None else position

    problems = []
    if organ.model_type != config.model_type:
        problems.append(_mismatch("model_type", organ.model_type, config.model_type, name))
    for key in SHARED_GEOMETRY:
        if (ours := getattr(organ, key, None)) != (theirs := getattr(config, key, None)):
            problems.append(_mismatch(key, ours, theirs, name))
    problems += _layer_type_problems(organ, config, name)
    problems += _place_problems(donor_config.num_organ_layers, position, mode, config, name)
    if not problems:
        return _structure_problems(donor_config, config, int(position or 0), mode, name)
    return _stack_problems(config, name) + problems


def require_compatibility(
    donor: DonorConfig, recipient: PreTrainedConfig, position: int | None, mode: str | None
) -> None:
    """Raise `IncompatibleDonorError` naming every mismatch, or return."""
    if problems := check_compatibility(donor, recipient, position, mode):
        raise IncompatibleDonorError("; ".join(problems))


def _stack_problems(config: PreTrainedConfig, name: str) -> list[str]:
    """Why a recipient takes no layers at all."""
    try:
        find_stack(meta_twin(config))
    except UnsupportedArchitectureError as error:
        return [f"{name}: {error}"]
    return []


def _mismatch(key: str, ours: Any, theirs: Any, name: str) -> str:
    return f"donor {key} {ours} does not fit recipient {key} {theirs} ({name}); choose a recipient with {key} {ours}"


def _layer_type_problems(organ: PreTrainedConfig, config: PreTrainedConfig, name: str) -> list[str]:
    """Layer types of the organ for which the recipient has no mask or no rotary embedding."""
    types = set(getattr(organ, "layer_types", None) or ())
    problems = []
    windowed = types & {"sliding_attention", "chunked_attention"} or not types
    ours, theirs = (getattr(each, "sliding_window", None) for each in (organ, config))
    if windowed and ours != theirs:
        problems.append(_mismatch("sliding_window", ours, theirs, name))
    rotary = getattr(config, "rope_parameters", None) or {}
    served = set(getattr(config, "layer_types", None) or ())
    if any(isinstance(value, dict) for value in rotary.values()) and types - served:  # one embedding per layer type
        problems.append(
            f"donor layer_types {sorted(types - served)} have no rotary embedding in {name}; "
            f"cut layers of type {sorted(served)}"
        )
    return problems


def _structure_problems(
    donor: DonorConfig, config: PreTrainedConfig, position: int, mode: str, name: str
) -> list[str]:
    """Whether the recipient's class would build other modules where the organ goes."""
    organ, base, k = donor.native_config(), donor.native_config("base_config"), donor.num_organ_layers
    rest = position + (k if mode == "replace" else 0)
    slots = [
        *((config, n) for n in range(position)),
        *((organ, n) for n in range(k)),
        *((config, n) for n in range(rest, config.num_hidden_layers)),
    ]
    try:
        natives = list(find_stack(meta_twin(spliced_config(config, slots))).layers)[position : position + k]
        layers = list(find_stack(meta_twin(base)).layers)[slice(*donor.span)]  # as they were built
    except UnsupportedArchitectureError as error:
        return [f"{name} cannot take these layers: {error}"]
    odd = {key for ours, theirs in zip(layers, natives, strict=True) for key in _tensors(ours) ^ _tensors(theirs)}
    if odd:
        return [f"layers of {name} are built of other modules than the donor's ({', '.join(sorted(odd)[:4])}, …)"]
    return []


def _tensors(layer: nn.Module) -> set[str]:
    """Names of the parameters, names and shapes of the buffers: masks and tables of positions must be long enough."""
    return {key for key, _ in layer.named_parameters()} | {
        f"{key} {tuple(buffer.shape)}" for key, buffer in layer.named_buffers()
    }


def _place_problems(k: int, position: Any, mode: str, config: PreTrainedConfig, name: str) -> list[str]:
    num_layers = getattr(config, "num_hidden_layers", None)
    if num_layers is None:
        return []
    last = num_layers if mode == "insert" else num_layers - k
    if mode not in ("insert", "replace"):
        return [f"mode must be 'insert' or 'replace', got {mode!r}"]
    if not hasattr(position, "__index__") or not 0 <= position <= last:
        room = f"position must be between 0 and {last}" if last >= 0 else "the organ is longer than the recipient"
        return [f"cannot {mode} {k} layers at position {position} of {num_layers} ({name}); {room}"]
    return []


def _donor_config(donor: DonorLike, hub_kwargs: dict[str, Any]) -> DonorConfig:
    if isinstance(donor, DonorConfig):
        return donor
    if isinstance(donor, DonorModel):
        return donor.config
    return DonorConfig.from_pretrained(os.fspath(donor), **hub_kwargs)


def _recipient_config(recipient: RecipientLike, hub_kwargs: dict[str, Any]) -> PreTrainedConfig:
    if isinstance(recipient, PreTrainedConfig):
        return recipient
    if isinstance(recipient, PreTrainedModel):
        return getattr(recipient, "base_config", recipient.config)  # positions count its own layers
    return AutoConfig.from_pretrained(os.fspath(recipient), **hub_kwargs)
