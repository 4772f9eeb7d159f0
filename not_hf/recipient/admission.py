"""Whether an organ may enter a model: everything about it is read and checked here, before the model changes."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from not_hf.architecture.devices import execution_device, follow
from not_hf.architecture.differences import computing_differences
from not_hf.architecture.layers import require_finite, settle
from not_hf.architecture.quantization import computes
from not_hf.architecture.scaling import require_scalable, scale_problem
from not_hf.architecture.upstream import attention_of, commit_of, is_partitioned, keys_left_in_place
from not_hf.composition.resolve import place_in_force, read_config, scale_in_force
from not_hf.composition.sources import OrganSource, is_plain_name
from not_hf.config import DonorConfig
from not_hf.donor.compatibility import mismatches
from not_hf.donor.modeling import DonorModel
from not_hf.donor.vocabulary import Home, vocabulary_differences
from not_hf.errors import IncompatibleDonorError, NotHFError, some
from not_hf.hub.repo import require_known, resolve_commit
from not_hf.recipient.organ import Organ
from not_hf.recipient.surgery import Surgery

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
        instead_of: Name of the loaded organ whose tensors are to take its weights.

    Returns:
        The organ, its layers this model's own: in the dtype and on the device of those at its position.

    Raises:
        NotHFError: Its name is taken, or none.
        IncompatibleDonorError: It does not fit the recipient or that organ's tensors, or overlaps an active organ.
        CorruptDonorError: Its files are off.
        OSError: They cannot be read.
    """
    require_known(hub_kwargs)
    name, donor = source.name, source.donor
    repo = None if isinstance(donor, DonorModel) else str(donor)
    if not is_plain_name(name) or (name in surgery.organs and name != instead_of):
        raise NotHFError(f"donor_name {name!r} is taken or not a plain name; choose another")
    if repo is not None:
        source = replace(source, revision=resolve_commit(repo, {**hub_kwargs, "revision": source.revision}))
    config = copy.deepcopy(read_config(source, hub_kwargs))
    if problems := mismatches(config, surgery.base_config, source.position, source.mode):
        raise IncompatibleDonorError("; ".join(problems))
    config.position, config.mode = place_in_force(source, config)
    scale, config.scale = scale_in_force(source, config), 1.0
    if problem := scale_problem(scale, config.mode):
        raise IncompatibleDonorError(f"organ {name!r}: {problem}")
    layers = _own_layers(model, surgery, source, config, hub_kwargs)
    organ = Organ(name, config, layers, source.active, repo, commit_of(source.revision))
    organ.set_trainable(is_trainable)
    if instead_of and (differences := surgery.swap_differences(surgery.organs[instead_of], organ)):
        raise IncompatibleDonorError(f"organ {name!r} cannot be swapped for another kind: {some(differences)}")
    beside = [o for o in surgery.organs.values() if o.active and source.active and o.name != instead_of]
    if not surgery.is_scaffold and (differences := surgery.differences(surgery.plan([*beside, organ]))):
        logger.warning("organ %r works here but cannot be merged into a native model: %s", name, some(differences))
    if scale != 1:
        require_scalable(surgery.stack(model), organ.layers[0])
        organ.rescale(scale)
    if others := computing_differences(organ.native_config, surgery.base_config):
        logger.warning("organ %r was cut under another config: %s", name, some(others))
    there = None if isinstance(donor, DonorModel) else Home(donor, source.revision, source.subfolder)
    here = Home(model.config.name_or_path, surgery.base_revision, surgery.base_subfolder)
    if tokens := vocabulary_differences(config, model.config, there, here, hub_kwargs.get("cache_dir")):
        logger.warning("organ %r was made with another vocabulary, and loads all the same: %s", name, some(tokens))
    return organ


def _own_layers(
    model: PreTrainedModel,
    surgery: Surgery,
    source: OrganSource,
    config: DonorConfig,
    hub_kwargs: Mapping[str, Any],
) -> list[nn.Module]:
    """Layers of an organ that are the model's own, in the dtype and on the device of those at its position.

    Where those are offloaded, the organ is not: its weights rest where they run.
    """
    base_layers, donor = surgery.base_layers or [model.get_input_embeddings()], source.donor
    neighbour = base_layers[min(config.position or 0, len(base_layers) - 1)]
    device = execution_device(neighbour)
    if device is None and any(parameter.is_meta for parameter in neighbour.parameters()):
        raise NotHFError("the recipient's layers have no weights (meta device); load it before an organ goes in")
    if is_partitioned(neighbour):
        raise NotHFError("DeepSpeed has taken the recipient apart (ZeRO-3); put organs in before training begins")
    if isinstance(donor, DonorModel):
        if any(parameter.is_meta for parameter in donor.parameters()):
            raise NotHFError("the donor is offloaded or has no weights (meta device); load it on a device")
        layers, known = [copy.deepcopy(layer) for layer in donor.stack.layers], {}
    else:
        loaded = DonorModel.from_pretrained(
            donor,
            config=config,
            dtype=next(p.dtype for p in neighbour.parameters() if computes(p)),
            attn_implementation=attention_of(model.config),
            revision=source.revision,
            subfolder=source.subfolder or "",
            **hub_kwargs,
        )
        layers, known = list(loaded.stack.layers), {p: p.dtype for p in loaded.parameters()}
    for layer in layers:
        settle(layer, neighbour, device)
        follow(layer, neighbour, keys_left_in_place(model))
    require_finite(layers, source.name, known)
    return layers
