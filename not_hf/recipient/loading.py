"""Load organs for a model, in its dtype and on its device. The model is not changed."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from not_hf.architecture.devices import execution_device, follow
from not_hf.architecture.differences import computing_differences
from not_hf.architecture.layers import computes, require_finite, settle
from not_hf.architecture.scaling import require_scalable
from not_hf.architecture.upstream import attention_of, commit_of, is_partitioned, keys_left_in_place
from not_hf.composition.resolve import ResolvedOrgan
from not_hf.donor.modeling import DonorModel
from not_hf.donor.vocabulary import Repo, vocabulary_differences
from not_hf.errors import NotHFError, some
from not_hf.recipient.organ import Organ
from not_hf.recipient.surgery import Surgery

logger = logging.getLogger(__name__)


def load_organs(
    model: PreTrainedModel,
    surgery: Surgery,
    organs: Sequence[ResolvedOrgan],
    differences: Sequence[str],
    is_trainable: bool,
    hub_kwargs: Mapping[str, Any],
) -> list[Organ]:
    """Load validated organs, each with layers of its own in the dtype and on the device of the model's layers.

    Args:
        model: The recipient.
        surgery: Its state.
        organs: Organs in load order.
        differences: Why they cannot be merged, as returned by `validate`.
        is_trainable: Make their parameters trainable.
        hub_kwargs: `token`, `cache_dir`, …

    Raises:
        CorruptDonorError: A donor is damaged, or its tensors contradict its config.
        NotHFError: The recipient or a donor is offloaded, partitioned or without weights.
        UnsupportedArchitectureError: A norm undoes an organ's scale.
        OSError: A file cannot be read.
    """
    loaded = [_load_organ(model, surgery, each, is_trainable, hub_kwargs) for each in organs]
    if differences and not surgery.is_scaffold:
        names = ", ".join(repr(organ.name) for organ in loaded)
        logger.warning("organ %s can run but not be merged into a native model: %s", names, some(differences))
    return loaded


def _load_organ(
    model: PreTrainedModel,
    surgery: Surgery,
    resolved: ResolvedOrgan,
    is_trainable: bool,
    hub_kwargs: Mapping[str, Any],
) -> Organ:
    source, spec = resolved.source, resolved.spec
    repo = None if isinstance(source.donor, DonorModel) else str(source.donor)
    config = copy.deepcopy(spec.config)
    config.position, config.mode, config.scale = int(resolved.place.position), resolved.place.mode, 1.0
    layers = _own_layers(model, surgery, resolved, hub_kwargs)
    commit = commit_of(source.revision)
    organ = Organ(resolved.name, config, spec, layers, source.active, repo, commit)
    organ.set_trainable(is_trainable)
    if resolved.scale != 1:
        require_scalable(surgery.stack(model), layers[0])
        organ.rescale(resolved.scale)
    if others := computing_differences(spec.organ, surgery.base_config):
        logger.warning("organ %r was cut from a model with another config: %s", organ.name, some(others))
    there = None if repo is None else Repo(repo, source.revision, source.subfolder)
    here = Repo(model.config.name_or_path, surgery.base_revision, surgery.base_subfolder)
    if tokens := vocabulary_differences(spec, model.config, there, here, hub_kwargs.get("cache_dir")):
        logger.warning("organ %r was cut from a model with another vocabulary: %s", organ.name, some(tokens))
    return organ


def _own_layers(
    model: PreTrainedModel, surgery: Surgery, resolved: ResolvedOrgan, hub_kwargs: Mapping[str, Any]
) -> list[nn.Module]:
    """Load or copy the layers of an organ, in the dtype and on the execution device of the layers at its position."""
    base_layers, source = surgery.base_layers or [model.get_input_embeddings()], resolved.source
    neighbour = base_layers[min(resolved.place.position, len(base_layers) - 1)]
    device = execution_device(neighbour)
    if device is None and any(parameter.is_meta for parameter in neighbour.parameters()):
        raise NotHFError("the recipient's layers have no weights (meta device); load its weights first")
    if is_partitioned(neighbour):
        raise NotHFError("the recipient is partitioned (DeepSpeed ZeRO-3); load organs before training begins")
    if isinstance(source.donor, DonorModel):
        if any(parameter.is_meta for parameter in source.donor.parameters()):
            raise NotHFError("the donor is offloaded or has no weights (meta device); load it on a device first")
        layers, known = [copy.deepcopy(layer) for layer in source.donor.stack.layers], {}
    else:
        where = {**hub_kwargs, "revision": source.revision, "subfolder": source.subfolder or ""}
        dtype = next(p.dtype for p in neighbour.parameters() if computes(p))
        attention = attention_of(model.config)
        loaded, _ = DonorModel.load_files(
            resolved.spec, str(source.donor), where, dtype, attn_implementation=attention
        )
        layers, known = list(loaded.stack.layers), {p: p.dtype for p in loaded.parameters()}
    for layer in layers:
        settle(layer, neighbour, device)
        follow(layer, neighbour, keys_left_in_place(model))
    require_finite(layers, source.name, known)
    return layers
