"""A merge without values: recipient and organs on the meta device, and where in which files their values are.

Everything that a merge checks is checked here, from configs and headers; of weights, only the organs' are read.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from huggingface_hub import ModelCard
from huggingface_hub.utils import TensorInfo
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from not_hf.architecture.file_layout import saved_tensors, used_conversions
from not_hf.architecture.layers import computes, is_finite
from not_hf.architecture.scaling import first_of_each_kind, require_scalable
from not_hf.architecture.splicing import spliced_config
from not_hf.architecture.stack import quantization_of, saved_class
from not_hf.architecture.twin import meta_twin
from not_hf.architecture.upstream import (
    HUB_KWARGS,
    attention_of,
    built_whole,
    commit_of,
    fetch_file,
    native_classes,
    without_load_report,
    without_progress_bar,
)
from not_hf.cards.merged import merged_card
from not_hf.composition.check import Fit, validate
from not_hf.composition.resolve import Resolved, ResolvedOrgan, resolve
from not_hf.composition.sources import DEFAULT_NAME, OrganSource
from not_hf.config import DonorConfig
from not_hf.donor.cutting import plain_config
from not_hf.donor.delta import FileTensor, with_base
from not_hf.donor.loading import open_tensors, refuse
from not_hf.donor.modeling import DonorModel
from not_hf.errors import CorruptDonorError, one_line
from not_hf.hub.checkpoint import hollow
from not_hf.hub.consistent_read import read_steadily
from not_hf.hub.partial_download import list_tensors
from not_hf.recipient.heads import class_for
from not_hf.recipient.loading import Training, fit_organs
from not_hf.recipient.modeling import Transplanted
from not_hf.recipient.organ import Organ
from not_hf.recipient.organ_tensor import OrganTensor, Replaced
from not_hf.recipient.surgery import Surgery


class NotCopiedError(Exception):
    """The tensors of a merged model are not those of the files; the message says why."""


@dataclass(frozen=True)
class OpenedMerge:
    """A recipient and organs whose configs fit together, and the organs' files."""

    resolved: Resolved
    fit: Fit
    files: list[dict[str, FileTensor]]  # of each organ

    @property
    def kind(self) -> type[Transplanted]:
        """The class of the recipient with organs."""
        return class_for(self.base_config)

    @property
    def base_config(self) -> PreTrainedConfig:
        """The whole config of the recipient."""
        config: PreTrainedConfig = self.resolved.base_kwargs["config"]
        return config

    @property
    def native_class(self) -> type[PreTrainedModel]:
        """The class that the Auto class builds the recipient of."""
        natives, saved = native_classes(self.kind.native_auto_class, self.base_config), saved_class(self.base_config)
        return saved if saved in natives else natives[0] if natives else type(meta_twin(self.base_config).model)

    @property
    def base_where(self) -> dict[str, Any]:
        """How the recipient's repo is reached."""
        kwargs = self.resolved.base_kwargs
        return {key: kwargs[key] for key in HUB_KWARGS if key in kwargs}


@dataclass(frozen=True)
class HollowMerge:
    """A merged model without values.

    Args:
        native: The model, on the meta device.
        card: Its card.
        tensors: The tensors that `save_pretrained` writes, in its order, on the meta device.
        sources: Where the values of each are: a tensor of an organ, or the name of one in the recipient's files.
    """

    native: PreTrainedModel
    card: ModelCard
    tensors: dict[str, torch.Tensor]
    sources: dict[str, OrganTensor | str] = field(repr=False)


def open_merge(
    first: str | os.PathLike[str], donor: str | os.PathLike[str] | None, hub_kwargs: Mapping[str, Any]
) -> OpenedMerge:
    """Read configs and headers. Arguments and errors as in `from_pretrained` of a transplanted model."""

    def read() -> OpenedMerge:
        resolved = resolve(first, donor, OrganSource(DEFAULT_NAME, ""), None, hub_kwargs)
        fit = validate(resolved.organs, resolved.base_config)
        return OpenedMerge(resolved, fit, [_open(organ, resolved.shared) for organ in resolved.organs])

    return read_steadily(first if donor is None else donor, read)


def hollow_merge(opened: OpenedMerge, folder: str | os.PathLike[str]) -> HollowMerge:
    """Merge on the meta device, with the checks of a merge in memory. `folder` is as in `merged_card`.

    Raises:
        NotCopiedError: The tensors of the merged model are not those of the files.
        NotHFError: As in `from_pretrained` and `merge_and_unload`.
    """
    resolved, shared = opened.resolved, opened.resolved.shared
    headers = _base_headers(opened)
    attention = attention_of(resolved.base_config)
    donors = [
        _hollow_donor(organ, files, attention) for organ, files in zip(resolved.organs, opened.files, strict=True)
    ]
    dtypes = [{name: tensor.dtype for name, tensor in donor.state_dict().items()} for donor in donors]
    located = _locate(meta_twin(opened.base_config, opened.native_class).model, headers)
    base = _hollow_base(opened, headers)

    surgery = Surgery(base, commit_of(opened.base_where.get("revision")), opened.base_where.get("subfolder") or None)
    at_one = [replace(organ, scale=1.0) for organ in resolved.organs]
    organs = fit_organs(base, surgery, at_one, donors, opened.fit.differences, Training(), shared.get("cache_dir"))
    of_organs = {}
    for found, organ, donor, files, loaded in zip(resolved.organs, organs, donors, opened.files, dtypes, strict=True):
        replaced = _replaced(organ, surgery.stack(base).full_path, located) if found.scale != 1 else {}
        of_organs[organ.name] = _organ_tensors(found, organ, donor.stack.full_path, files, loaded, replaced)
    kept = {organ.name: organ.kept for organ in organs}
    places = {organ.name: organ.place.position for organ in organs}
    surgery.generation_configs.organs = resolved.generation_config
    model = opened.kind._splice(base, surgery, organs)
    card, path = merged_card(model, folder, **shared), surgery.stack(model).full_path
    native = model.merge_and_unload()
    if (tensors := saved_tensors(native)) is None:
        raise NotCopiedError("transformers saves its tensors in another layout than it computes with")

    def source(name: str) -> OrganTensor | str:
        if not (match := re.fullmatch(rf"{re.escape(path)}\.(\d+)\.(.+)", name)):
            return located[name]
        organ, n = opened.fit.stack[int(match[1])]
        if organ is None:
            return located[f"{path}.{n}.{match[2]}"]
        if (key := f"{n}.{match[2]}") in kept[organ]:
            return located[f"{path}.{places[organ] + n}.{match[2]}"]
        return of_organs[organ][key]

    return HollowMerge(native, card, tensors, {name: source(name) for name in tensors})


def _open(organ: ResolvedOrgan, shared: Mapping[str, Any]) -> dict[str, FileTensor]:
    """Open the files of an organ, and of the layers that they are a change of, if so."""
    where = {**shared, "revision": organ.revision, "subfolder": organ.subfolder or ""}
    donor, config = str(organ.donor), organ.spec.config
    return with_base(donor, open_tensors(donor, config, where), config, where)


def _base_headers(opened: OpenedMerge) -> dict[str, TensorInfo]:
    """Read the headers of the recipient's files, unless its config says that they are not the model's."""
    config, base, where = opened.base_config, str(opened.resolved.base), opened.base_where
    if quantization_of(config) is not None:
        raise NotCopiedError("the recipient is quantized")
    if not any(organ.active for organ in opened.resolved.organs):
        raise NotCopiedError("no organ is active")
    configs = [organ.spec.config for organ in opened.resolved.organs]
    if any(each.modules_to_save or each.trainable_token_indices for each in configs):
        raise NotCopiedError("an organ holds modules beside its layers")
    if getattr(config, "transformers_weights", None) or fetch_file(base, "adapter_config.json", **where):
        raise NotCopiedError("the recipient has other weights than model.safetensors, or adapters")
    try:
        headers = list_tensors(base, **where)
        kinds = {tensor.dtype for tensor in hollow(headers).values() if tensor.is_floating_point()}
    except (OSError, CorruptDonorError, KeyError) as error:
        raise NotCopiedError(f"the headers of the recipient's files cannot be read: {one_line(error)}") from error
    if config.dtype is None and len(kinds) != 1:
        raise NotCopiedError("the recipient's config has no dtype, and its files have several")
    return headers


def _hollow_donor(
    organ: ResolvedOrgan, files: Mapping[str, FileTensor], attn_implementation: str | None
) -> DonorModel:
    """Build a donor on the meta device, as strictly as it is loaded."""
    options: dict[str, Any] = {"attn_implementation": attn_implementation, "device_map": "meta"}
    with without_progress_bar():
        donor, _ = DonorModel.load_tensors(organ.spec, hollow(files), source=str(organ.donor), **options)
    donor.config.name_or_path, donor.config.digests = str(organ.donor), None
    if files.keys() != donor.state_dict().keys():
        raise NotCopiedError("the tensors of the organ have another layout in its files than in the model")
    return donor


def _hollow_base(opened: OpenedMerge, headers: Mapping[str, TensorInfo]) -> PreTrainedModel:
    """Build the recipient on the meta device, with the dtypes that it has when it is loaded."""
    base, where, native = str(opened.resolved.base), opened.base_where, cast(Any, opened.native_class)
    options = {key: value for key, value in opened.resolved.base_kwargs.items() if key not in HUB_KWARGS}
    options |= {"state_dict": hollow(headers), "device_map": "meta", "output_loading_info": True}
    with built_whole(), without_load_report(), without_progress_bar():
        model, info = native.from_pretrained(None, **options)
    if used_conversions(model) or info["missing_keys"]:
        raise NotCopiedError("the recipient's tensors have another layout in its files than in the model")
    model.config.name_or_path = model.name_or_path = base
    if model.can_generate():
        defaults = dict.fromkeys(("cache_dir", "proxies", "token", "revision")) | {"subfolder": ""}
        defaults |= dict.fromkeys(("force_download", "local_files_only"), False)
        model.adjust_generation_fn(None, True, None, base, **{**defaults, **where}, trust_remote_code=None)
    return model


def _locate(base: PreTrainedModel, headers: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Find the name of each tensor of the recipient in its files, with or without the prefix of the base model."""
    state, located, prefix = base.state_dict(), dict[str, str](), base.base_model_prefix
    for name in headers:
        for key in {name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")}:
            if key in state and located.setdefault(key, name) != name:
                raise NotCopiedError(f"the recipient's files hold {key} twice")
    names: dict[int, list[str]] = {}  # of each parameter, several if it is tied
    for name, parameter in base.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    tied = [each for each in names.values() if len(each) > 1]
    tied += [[key, value] for key, value in (getattr(base, "all_tied_weights_keys", None) or {}).items()]
    for group in tied:
        stored = {located[name] for name in group if name in located}
        if len(stored) != 1:
            raise NotCopiedError(f"the recipient's files do not hold one of {', '.join(group)}, which its config ties")
        located |= dict.fromkeys(group, stored.pop())
    if absent := [name for name in state if name not in located]:
        more = f" and {len(absent) - 1} more" * (len(absent) > 1)
        raise NotCopiedError(f"the recipient's files lack tensors, or have another layout: {absent[0]}{more}")
    return located


def _organ_tensors(
    resolved: ResolvedOrgan,
    organ: Organ,
    path: str,
    files: Mapping[str, FileTensor],
    loaded: Mapping[str, torch.dtype],
    replaced: Mapping[str, Replaced],
) -> dict[str, OrganTensor]:
    """Locate the tensors of an organ in a donor's files, by layer and name in it, and check their values.

    Those of scaled replacements depend on the recipient's, and are checked at their scale when they are read.

    Raises:
        CorruptDonorError: A value is not finite, or not in the dtype of the recipient.
        NotHFError: A value is not finite at the organ's scale.
        UnsupportedArchitectureError: A norm undoes the scale.
    """
    if resolved.scale != 1 and organ.config.mode == "insert":
        for place in first_of_each_kind(organ.layers):
            _require_scalable(resolved, place, path, files)
    scalable = organ.scalable()
    tensors = dict[str, OrganTensor]()
    for key, value in organ.state().items():
        name, scale = f"{path}.{key}", resolved.scale if key in scalable else 1.0
        label = f"organ {organ.name!r}: at scale {scale:g} weights overflow {value.dtype} ({key})"
        tensors[key] = OrganTensor(label, files[name], loaded[name], value.dtype, scale, replaced.get(key))
    damaged = [key for key, tensor in tensors.items() if not _stays_finite(tensor, tensor.loaded)]
    refuse(str(resolved.donor), [f"non-finite values in {path}.{key}" for key in damaged])
    for key, tensor in tensors.items():
        n, _, inner = key.partition(".")
        if tensor.dtype != tensor.loaded and not _stays_finite(tensor, tensor.dtype):
            raise CorruptDonorError(f"organ {organ.name!r}: non-finite values in layer {n} {inner} as {tensor.dtype}")
        if tensor.scale != 1 and tensor.replaced is None:
            for _ in tensor.values():
                pass
    return tensors


def _replaced(organ: Organ, path: str, located: Mapping[str, str]) -> dict[str, Replaced]:
    """Locate the recipient's parameters in whose place those of a scaled organ stand, if any, by layer and name in it.

    Raises:
        NotCopiedError: They have other shapes.
    """
    if organ.config.mode == "insert":
        return {}
    theirs, found = dict(nn.ModuleList(organ.replaced).named_parameters()), dict[str, Replaced]()
    for name, ours in organ.scalable().items():
        if name not in theirs or theirs[name].shape != ours.shape or not computes(theirs[name]):
            raise NotCopiedError("an organ that has a scale replaces layers of another structure")
        n, _, inner = name.partition(".")
        found[name] = located[f"{path}.{organ.place.position + int(n)}.{inner}"], theirs[name].dtype
    return found


def _stays_finite(tensor: OrganTensor, dtype: torch.dtype) -> bool:
    return all(map(is_finite, replace(tensor, dtype=dtype, scale=1.0).values()))


def _require_scalable(organ: ResolvedOrgan, n: int, path: str, files: Mapping[str, FileTensor]) -> None:
    """`require_scalable` on layer `n` of an organ, the only one that is loaded for it."""
    config: DonorConfig = copy.deepcopy(organ.spec.config)
    place = config.span[0] + n
    config.layers, config.digests = [place, place + 1], None
    config.organ_config = plain_config(spliced_config(organ.spec.base, [(organ.spec.base, place)]))
    here = f"{path}.{n}."
    views = {f"{path}.0.{name.removeprefix(here)}": view for name, view in files.items() if name.startswith(here)}
    with without_progress_bar():
        layer, _ = DonorModel.load_tensors(config.check(), views, source=str(organ.donor))
    require_scalable(layer.stack, list(layer.stack.layers))
