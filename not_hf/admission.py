"""Whether an organ may enter a model: everything about it is read and checked here, before the model changes."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from not_hf.anatomy import (
    DENSE_PREFIXES,
    LAYER_INDEX_LISTS,
    LAYERLESS,
    PER_LAYER_LISTS,
    PERIODS,
    config_differences,
)
from not_hf.compatibility import require_compatibility
from not_hf.composition import place_in_force, read_config
from not_hf.cutting import resolve_commit
from not_hf.donor import DonorModel
from not_hf.entries import OrganSource, is_plain_name
from not_hf.errors import NotHFError, some
from not_hf.layers import require_finite, settle
from not_hf.splice import Organ, Surgery
from not_hf.vocabulary import Home, vocabulary_differences
from not_hf.zero3 import is_partitioned

logger = logging.getLogger(__name__)


def admit(
    model: PreTrainedModel,
    surgery: Surgery,
    source: OrganSource,
    is_trainable: bool,
    hub_kwargs: Mapping[str, Any],
    instead_of: str | None = None,
) -> Organ:
    """Read an organ and check everything about it; the model is not changed.

    Args:
        model: The recipient.
        surgery: Its organs.
        source: The organ, and where it is to go.
        is_trainable: Make its parameters trainable.
        hub_kwargs: How its repo is reached.
        instead_of: Name of the loaded organ that it takes the place of.

    Returns:
        The organ, its layers this model's own: in the dtype and on the device of those at its position.

    Raises:
        NotHFError: Its name is taken, or none.
        IncompatibleDonorError: It does not fit the recipient, or overlaps an active organ.
        CorruptDonorError: Its files are off.
        OSError: They cannot be read.
    """
    name, donor = source.name, source.donor
    repo = None if isinstance(donor, DonorModel) else str(donor)
    if not is_plain_name(name) or (name in surgery.organs and name != instead_of):
        raise NotHFError(f"donor_name {name!r} is taken or not a plain name; choose another")
    if repo is not None:
        source = replace(source, revision=resolve_commit(repo, {**hub_kwargs, "revision": source.revision}))
    config = copy.deepcopy(read_config(source, hub_kwargs))
    require_compatibility(config, surgery.base_config, source.position, source.mode)
    config.position, config.mode = place_in_force(source, config)
    layers = _own_layers(model, surgery, source, config.position, is_trainable, hub_kwargs)
    organ = Organ(name, config, layers, source.active, repo, getattr(source.revision, "resolved", None))
    beside = [o for o in surgery.organs.values() if o.active and source.active and o.name != instead_of]
    if differences := surgery.differences(surgery.plan([*beside, organ])):
        logger.warning("organ %r works here but cannot be merged into a native model: %s", name, some(differences))
    if others := [d for d in config_differences(organ.native_config, surgery.base_config) if _computes(d)]:
        logger.warning("organ %r was cut under another config; here its %s", name, some(others))
    there = None if isinstance(donor, DonorModel) else Home(donor, source.revision, source.subfolder)
    here = Home(model.config.name_or_path, surgery.base_revision, surgery.base_subfolder)
    if others := vocabulary_differences(config, model.config, there, here, hub_kwargs.get("cache_dir")):
        logger.warning("organ %r was made with another vocabulary, and loads all the same: %s", name, some(others))
    return organ


def _own_layers(
    model: PreTrainedModel,
    surgery: Surgery,
    source: OrganSource,
    position: int,
    is_trainable: bool,
    hub_kwargs: Mapping[str, Any],
) -> list[nn.Module]:
    """Layers of an organ that are the model's own, in the dtype and on the device of those at `position`."""
    base_layers, donor = surgery.base_layers, source.donor
    neighbour = base_layers[min(position, len(base_layers) - 1)]
    if any(parameter.is_meta for parameter in neighbour.parameters()):
        raise NotHFError("the recipient is offloaded to disk or CPU; load it without offloading first")
    if is_partitioned(neighbour):
        raise NotHFError("DeepSpeed has taken the recipient apart (ZeRO-3); put organs in before training begins")
    if isinstance(donor, DonorModel):
        layers = [copy.deepcopy(layer) for layer in donor.stack.layers]
    else:
        loaded = DonorModel.from_pretrained(
            donor,
            dtype=next(p.dtype for p in neighbour.parameters() if p.is_floating_point()),
            attn_implementation=model.config._attn_implementation,
            revision=source.revision,
            subfolder=source.subfolder or "",
            **hub_kwargs,
        )
        layers = list(loaded.stack.layers)
    for layer in layers:
        settle(layer, neighbour, is_trainable)
    require_finite(layers, source.name)
    return layers


def _computes(difference: str) -> bool:
    """Whether a difference of configs may change what layers compute: some read the recipient's config as they run."""
    key = difference.partition(" ")[0]
    spliced = {"num_hidden_layers", *PER_LAYER_LISTS, *LAYER_INDEX_LISTS, *DENSE_PREFIXES, *PERIODS}
    return key not in spliced | LAYERLESS and "dropout" not in key and not key.endswith("_token_id")
