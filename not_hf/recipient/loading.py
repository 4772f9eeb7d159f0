"""Load donors, and turn them into organs of a model. The model is not changed."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from not_hf.architecture.devices import execution_device, follow
from not_hf.architecture.differences import computing_differences
from not_hf.architecture.layers import follow_dropout, require_finite, settle
from not_hf.architecture.part_names import ALL
from not_hf.architecture.splicing import moved_features
from not_hf.architecture.stack import layers_config
from not_hf.architecture.upstream import attention_of, commit_of, is_partitioned, keys_left_in_place
from not_hf.composition.check import validate
from not_hf.composition.resolve import ResolvedOrgan, resolve_organ
from not_hf.composition.sources import OrganSource
from not_hf.donor.modeling import DonorModel
from not_hf.donor.saved_modules import Indices, choose_modules, held_by, is_saved, sharing_differences
from not_hf.donor.vocabulary import Repo, vocabulary_differences
from not_hf.errors import NotHFError, some
from not_hf.hub.consistent_read import read_steadily
from not_hf.recipient.organ import Organ, inside
from not_hf.recipient.parts import layers_with_parts
from not_hf.recipient.saved_modules import fit_saved_modules
from not_hf.recipient.surgery import Surgery

logger = logging.getLogger(__name__)


class Training(NamedTuple):
    """How organs are trained.

    Args:
        is_trainable: Whether they are.
        master_weights: Hold weights in float32 though they compute in the dtype of the model.
        modules_to_save: Modules that they are to hold besides those of their donors.
        trainable_token_indices: Rows that they are to hold besides those of their donors.
    """

    is_trainable: bool = False
    master_weights: bool = False
    modules_to_save: Sequence[str] | None = None
    trainable_token_indices: Indices | None = None

    @property
    def chooses_modules(self) -> bool:
        """Whether they are to hold more modules than their donors."""
        return self.modules_to_save is not None or self.trainable_token_indices is not None


def read_donor(
    model: PreTrainedModel,
    surgery: Surgery,
    source: OrganSource,
    others: Iterable[Organ],
    hub_kwargs: Mapping[str, Any],
    verify: bool,
) -> tuple[ResolvedOrgan, list[DonorModel], list[str]]:
    """Resolve, validate and load one donor, to stand beside `others` in a model.

    Returns:
        The resolved organ, its donor as in `load_donors`, and the differences that prevent a merge.
    """

    def read() -> tuple[ResolvedOrgan, list[DonorModel], list[str]]:
        organ = resolve_organ(source, hub_kwargs)
        fit = validate([organ], surgery.base_config, list(others))
        return (
            organ,
            load_donors([organ], attention_of(surgery.stack(model).base_model.config), hub_kwargs, verify),
            fit.differences,
        )

    return read_steadily(source.donor, read)


def load_donors(
    organs: Sequence[ResolvedOrgan],
    attn_implementation: str | None,
    hub_kwargs: Mapping[str, Any],
    verify: bool = False,
) -> list[DonorModel]:
    """Load donors of validated organs on the CPU, each in its own dtype; a `DonorModel` is returned as it is.

    Raises:
        NotHFError: `verify`, and there is no digest.
        CorruptDonorError: A donor is damaged, or its tensors contradict its config or, if `verify`, their digest.
        OSError: A file cannot be read.
    """
    donors = []
    for organ in organs:
        donor = organ.donor
        if not isinstance(donor, DonorModel):
            where = {**hub_kwargs, "revision": organ.revision, "subfolder": organ.subfolder or ""}
            options: dict[str, Any] = {"attn_implementation": attn_implementation, "verify": verify}
            donor, _ = DonorModel.load_files(organ.spec, str(donor), where, **options)
        elif verify:
            raise NotHFError(
                "a DonorModel in memory has no digest to verify; leave verify out, or give its folder or ID"
            )
        donors.append(donor)
    return donors


def fit_organs(
    model: PreTrainedModel,
    surgery: Surgery,
    organs: Sequence[ResolvedOrgan],
    donors: Sequence[DonorModel],
    differences: Sequence[str],
    training: Training,
    cache_dir: str | os.PathLike[str] | None = None,
) -> list[Organ]:
    """Turn donors from `load_donors` into organs with their own layers, in the dtype and on the device of the model.

    Warns of `differences` from `validate`, and of those in vocabularies, for which tokenizers in `cache_dir` are read.

    Raises:
        CorruptDonorError: A value overflows in that dtype.
        IncompatibleDonorError: Modules beside the layers do not fit.
        NotHFError: The recipient or a donor is offloaded, partitioned or without weights, or modules to save are not
            there.
        UnsupportedArchitectureError: A norm undoes an organ's scale.
    """
    if training.chooses_modules and len(organs) > 1:
        raise NotHFError("modules_to_save and trainable_token_indices need one organ, and the donor is a composition")
    fitted = [
        _fit_organ(model, surgery, organ, donor, training, cache_dir)
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
    training: Training,
    cache_dir: str | os.PathLike[str] | None,
) -> Organ:
    spec, repo = resolved.spec, None if isinstance(resolved.donor, DonorModel) else str(resolved.donor)
    config = copy.deepcopy(spec.config)
    config.position, config.mode, config.scale = int(resolved.place.position), resolved.mode, 1.0
    config.digests = config.delta = None  # the organ's tensors may change
    stack = surgery.stack(model)
    if training.chooses_modules:
        choose_modules(config, stack, training.modules_to_save, training.trainable_token_indices)
    layers, kept = _own_layers(model, surgery, resolved, donor, training.master_weights)
    apart = (training.is_trainable, training.master_weights)
    saved = fit_saved_modules(model, stack, surgery.base_modules, config, held_by(donor), *apart)
    revision = commit_of(resolved.revision)
    organ = Organ(resolved.name, config, spec, layers, resolved.active, repo, revision, saved=saved, kept=kept)
    organ.replaced = [] if surgery.is_scaffold else [surgery.base_layers[n] for n in organ.place.replaced]
    organ.set_trainable(training.is_trainable)
    if resolved.scale != 1:
        if any(parameter.is_meta for parameter in layers[0].parameters()):
            raise NotHFError(
                f"an empty model (meta device) cannot take an organ of scale {resolved.scale:g}; make it at scale 1 "
                f"and call set_donor_scale({organ.name!r}, {resolved.scale:g}) when the weights are loaded"
            )
        organ.require_scalable(stack)
        organ.rescale(resolved.scale)
    if others := computing_differences(spec.organ, surgery.base_config):
        logger.warning("organ %r was cut from a model with another config: %s", organ.name, some(others))
    if shared := sharing_differences(spec.config, spec.base, surgery.base_config):
        logger.warning("organ %r holds modules that share weights otherwise here: %s", organ.name, some(shared))
    for moved in moved_features(model.config, organ.place.position, organ.place.mode):
        logger.warning("organ %r: %s", organ.name, moved)
    there = None if repo is None else Repo(repo, resolved.revision, resolved.subfolder)
    here = Repo(surgery.base_config.name_or_path, surgery.base_revision, surgery.base_subfolder)
    if tokens := vocabulary_differences(spec, layers_config(model.config), there, here, cache_dir, bool(saved)):
        logger.warning("organ %r was cut from a model with another vocabulary: %s", organ.name, some(tokens))
    return organ


def _own_layers(
    model: PreTrainedModel, surgery: Surgery, resolved: ResolvedOrgan, donor: DonorModel, master_weights: bool
) -> tuple[list[nn.Module], frozenset[str]]:
    """Take or copy a donor's layers, in the dtype and on the execution device of the layers at its position.

    Neither or both of recipient and donor may be empty (on the meta device), as in `from_config`.

    Returns:
        The layers, and the names of the recipient's own tensors in them, as `Organ.kept`.
    """
    neighbour = surgery.neighbour(model, resolved.place.position)
    device = execution_device(neighbour)
    is_empty = device is None and any(parameter.is_meta for parameter in neighbour.parameters())
    has_values = not any(parameter.is_meta for parameter in donor.parameters())
    if is_empty and has_values:
        raise NotHFError("the recipient's layers have no weights (meta device); load its weights first")
    if is_partitioned(neighbour):
        raise NotHFError("the recipient is partitioned (DeepSpeed ZeRO-3); load organs before training begins")
    kept: frozenset[str] = frozenset()
    known: dict[nn.Parameter, torch.dtype] = {}
    if donor is resolved.donor and not (has_values or is_empty):  # the caller's
        raise NotHFError("the donor is offloaded or has no weights (meta device); load it on a device first")
    if donor.config.modules != ALL:
        layers, kept = layers_with_parts(surgery, resolved.place.position, donor, donor is resolved.donor)
        parameters = nn.ModuleList(layers).named_parameters()
        known = {each: each.dtype for name, each in parameters if name in kept}
    elif donor is resolved.donor:
        layers, known = [copy.deepcopy(layer) for layer in donor.stack.layers], {}
    else:
        layers, known = list(donor.stack.layers), {parameter: parameter.dtype for parameter in donor.parameters()}
    for n, layer in enumerate(layers):
        settle(layer, neighbour, device, master_weights, inside(kept, n))
        follow_dropout(layer, neighbour)
        follow(layer, neighbour, keys_left_in_place(model))
    if has_values:
        require_finite(layers, resolved.name, known)
    return layers, kept


def by_organ(state_dict: Mapping[str, Any], names: Sequence[str]) -> dict[str, dict[str, Any]] | None:
    """Sort the tensors of a trainer's checkpoint by organ; `None` if it is none.

    Raises:
        NotHFError: It is of one organ, and the model has none or several; or of organs that the model lacks.
    """

    def is_of_organ(key: str) -> bool:
        return key.startswith(f"{DonorModel.base_model_prefix}.") or is_saved(key)

    states: dict[str, dict[str, Any]] = {}
    for key, value in state_dict.items():
        name, _, inner = key.partition(".")
        if is_of_organ(inner):
            states.setdefault(name, {})[inner] = value
    if state_dict and sum(map(len, states.values())) == len(state_dict):
        if lacking := sorted(states.keys() - names):
            raise NotHFError(f"the checkpoint has organs that the model lacks: {', '.join(lacking)}; load them first")
        return states
    if not state_dict or not all(map(is_of_organ, state_dict)):
        return None
    if len(names) != 1:
        raise NotHFError(
            f"the checkpoint of an organ needs a model with exactly one organ, not {len(names)}; use load_donor"
        )
    return {names[0]: dict(state_dict)}
