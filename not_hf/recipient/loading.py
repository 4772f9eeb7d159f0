"""Load donors, and turn them into organs of a model. The model is not changed."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from not_hf.architecture.devices import execution_device, follow
from not_hf.architecture.differences import computing_differences
from not_hf.architecture.layers import require_finite, settle
from not_hf.architecture.scaling import require_scalable
from not_hf.architecture.upstream import commit_of, is_partitioned, keys_left_in_place
from not_hf.composition.resolve import ResolvedOrgan
from not_hf.donor.modeling import DonorModel
from not_hf.donor.vocabulary import Repo, vocabulary_differences
from not_hf.errors import NotHFError, some
from not_hf.recipient.organ import Organ
from not_hf.recipient.surgery import Surgery

logger = logging.getLogger(__name__)


def load_donors(
    organs: Sequence[ResolvedOrgan], attn_implementation: str | None, hub_kwargs: Mapping[str, Any]
) -> list[DonorModel]:
    """Load donors of validated organs on the CPU, each in its own dtype; a `DonorModel` is returned as it is.

    Raises:
        CorruptDonorError: A donor is damaged, or its tensors contradict its config.
        OSError: A file cannot be read.
    """
    donors = []
    for organ in organs:
        donor = organ.donor
        if not isinstance(donor, DonorModel):
            where = {**hub_kwargs, "revision": organ.revision, "subfolder": organ.subfolder or ""}
            options = {"attn_implementation": attn_implementation}
            donor, _ = DonorModel.load_files(organ.spec, str(donor), where, **options)
        donors.append(donor)
    return donors


def fit_organs(
    model: PreTrainedModel,
    surgery: Surgery,
    organs: Sequence[ResolvedOrgan],
    donors: Sequence[DonorModel],
    differences: Sequence[str],
    is_trainable: bool,
    master_weights: bool,
    cache_dir: str | os.PathLike[str] | None = None,
) -> list[Organ]:
    """Turn donors from `load_donors` into organs with their own layers, in the dtype and on the device of the model.

    Warns of `differences` from `validate`, and of those in vocabularies, for which tokenizers in `cache_dir` are read.
    With `master_weights`, weights are float32 though they compute in the dtype of the model.

    Raises:
        CorruptDonorError: A value overflows in that dtype.
        NotHFError: The recipient or a donor is offloaded, partitioned or without weights.
        UnsupportedArchitectureError: A norm undoes an organ's scale.
    """
    fitted = [
        _fit_organ(model, surgery, organ, donor, is_trainable, master_weights, cache_dir)
        for organ, donor in zip(organs, donors, strict=True)
    ]
    if differences and not surgery.is_scaffold:
        names = ", ".join(repr(organ.name) for organ in fitted)
        logger.warning("organ %s can run but not be merged into a native model: %s", names, some(differences))
    return fitted


def _fit_organ(
    model: PreTrainedModel,
    surgery: Surgery,
    resolved: ResolvedOrgan,
    donor: DonorModel,
    is_trainable: bool,
    master_weights: bool,
    cache_dir: str | os.PathLike[str] | None,
) -> Organ:
    spec, repo = resolved.spec, None if isinstance(resolved.donor, DonorModel) else str(resolved.donor)
    config = copy.deepcopy(spec.config)
    config.position, config.mode, config.scale = int(resolved.place.position), resolved.mode, 1.0
    layers = _own_layers(model, surgery, resolved, donor, master_weights)
    organ = Organ(resolved.name, config, spec, layers, resolved.active, repo, commit_of(resolved.revision))
    organ.set_trainable(is_trainable)
    if resolved.scale != 1:
        require_scalable(surgery.stack(model), layers[0])
        organ.rescale(resolved.scale)
    if others := computing_differences(spec.organ, surgery.base_config):
        logger.warning("organ %r was cut from a model with another config: %s", organ.name, some(others))
    there = None if repo is None else Repo(repo, resolved.revision, resolved.subfolder)
    here = Repo(model.config.name_or_path, surgery.base_revision, surgery.base_subfolder)
    if tokens := vocabulary_differences(spec, model.config, there, here, cache_dir):
        logger.warning("organ %r was cut from a model with another vocabulary: %s", organ.name, some(tokens))
    return organ


def _own_layers(
    model: PreTrainedModel, surgery: Surgery, resolved: ResolvedOrgan, donor: DonorModel, master_weights: bool
) -> list[nn.Module]:
    """Take or copy a donor's layers, in the dtype and on the execution device of the layers at its position."""
    neighbour = surgery.neighbour(model, resolved.place.position)
    device = execution_device(neighbour)
    if device is None and any(parameter.is_meta for parameter in neighbour.parameters()):
        raise NotHFError("the recipient's layers have no weights (meta device); load its weights first")
    if is_partitioned(neighbour):
        raise NotHFError("the recipient is partitioned (DeepSpeed ZeRO-3); load organs before training begins")
    if donor is resolved.donor:  # the caller's
        if any(parameter.is_meta for parameter in donor.parameters()):
            raise NotHFError("the donor is offloaded or has no weights (meta device); load it on a device first")
        layers, known = [copy.deepcopy(layer) for layer in donor.stack.layers], {}
    else:
        layers, known = list(donor.stack.layers), {parameter: parameter.dtype for parameter in donor.parameters()}
    for layer in layers:
        settle(layer, neighbour, device, master_weights)
        follow(layer, neighbour, keys_left_in_place(model))
    require_finite(layers, resolved.name, known)
    return layers
