"""Bases to cut from: a live model, or a checkpoint in a folder or on the Hub."""

from __future__ import annotations

import hashlib
import operator
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from huggingface_hub.utils import TensorInfo
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.quantizers import AutoQuantizationConfig

from not_hf.architecture.adapters import has_adapters, stored_adapter
from not_hf.architecture.devices import execution_device
from not_hf.architecture.differences import fingerprint
from not_hf.architecture.part_names import ALL, Modules, parts_problem
from not_hf.architecture.splicing import place_bound, spliced_config
from not_hf.architecture.stack import Stack, find_stack, layers_config, quantization_of, saved_class
from not_hf.architecture.tables import STORED_NAMES, TEXT_PREFIXES
from not_hf.architecture.twin import meta_twin, require_loadable
from not_hf.architecture.upstream import HUB_KWARGS, commit_of, fetch_file, require_known, resolve_commit
from not_hf.cards.license import inherit_license
from not_hf.config import INITS, MODES, DonorConfig
from not_hf.errors import CorruptDonorError, NotHFError, UnsupportedArchitectureError, reading_repo
from not_hf.hub.partial_download import list_part, open_part

Span = tuple[int, int]  # half-open, in layers
T = TypeVar("T")

# Config keys that do not concern the layers of a donor.
_STORAGE = (
    *("id2label", "label2id", "_name_or_path", "architectures", "transformers_version"),
    "quantization_config",  # donors are not quantized
)


@dataclass(frozen=True)
class LiveBase:
    """A base in memory."""

    name: str | None  # Hub ID or folder, if any
    config: PreTrainedConfig
    path: str  # of the stack in the base model
    model: PreTrainedModel
    stack: Stack

    revision = None  # transformers does not record it
    quantization = None  # a quantized live model cannot be cut
    hub_kwargs: ClassVar[Mapping[str, Any]] = {"local_files_only": True}  # no requests for its card

    def tensors(self, span: Span) -> dict[str, torch.Tensor]:
        """Copy the tensors of a span, by name in the base model, with layers numbered from 0.

        Raises:
            NotHFError: The model is offloaded or has no weights.
        """
        state = self.stack.layers[slice(*span)].state_dict()
        tensors = {f"{self.path}.{key}": tensor.detach().clone() for key, tensor in state.items()}
        if any(tensor.is_meta for tensor in tensors.values()):
            if execution_device(self.stack.layers[span[0]]) is None:
                raise NotHFError("the live model has no weights (meta device); load them, or give a folder or Hub ID")
            raise NotHFError("the live model is offloaded; give its folder or Hub ID instead")
        return tensors


@dataclass(frozen=True)
class StoredBase:
    """A safetensors checkpoint in a folder or on the Hub."""

    name: str
    revision: str | None  # commit on the Hub
    config: PreTrainedConfig
    prefixes: tuple[str, ...]  # what may stand before the path of the stack
    path: str
    hub_kwargs: Mapping[str, Any]
    quantization: dict[str, Any] | None = None  # for transformers to dequantize the weights, if quantized

    def tensors(self, span: Span, needed: Collection[str] | None = None) -> dict[str, Any]:
        """`LiveBase.tensors` as lazy views of files. Only the bytes of these tensors are downloaded.

        Args:
            span: Layers.
            needed: Names of those that are needed, as in the result; `None`: all.

        Raises:
            CorruptDonorError: A layer of the span has no tensors.
            OSError: The checkpoint cannot be read.
        """
        wanted, part = layer_pattern(self.prefixes, self.path, span), f"layers-{span[0]}-{span[1]}"
        if needed is not None:
            names = sorted(name.removeprefix(f"{self.path}.") for name in needed)
            parted = (name.partition(".") for name in names)
            numbered = (re.escape(f"{int(n) + span[0]}.{inner}") for n, _, inner in parted)
            wanted = _pattern(self.prefixes, self.path, rf"(?:{'|'.join(numbered)})\Z")
            part += f"-{hashlib.sha256(repr(names).encode()).hexdigest()[:16]}"
        return self._by_layer(open_part(self.name, wanted, part, **self.hub_kwargs), span)

    def headers(self, span: Span) -> dict[str, TensorInfo]:
        """Return the headers of these tensors, by the same names; raises as `tensors`."""
        wanted, part = layer_pattern(self.prefixes, self.path, span), f"layers-{span[0]}-{span[1]}"
        return self._by_layer(list_part(self.name, wanted, part, **self.hub_kwargs), span)

    def _renamed(self, name: str, span: Span) -> str:
        """Return the name in the base model of a tensor in a file, with layers numbered from 0."""
        match = layer_pattern(self.prefixes, self.path, span).match(name)
        assert match is not None  # as `open_part` selected it
        return f"{self.path}.{int(match[1]) - span[0]}.{match[2]}"

    def _by_layer(self, found: Mapping[str, T], span: Span) -> dict[str, T]:
        tensors: dict[str, T] = {}
        for name, tensor in found.items():
            if (new := self._renamed(name, span)) in tensors:
                raise CorruptDonorError(f"{self.name} holds {name} twice, with another prefix or without")
            tensors[new] = tensor
        present = {int(name.removeprefix(f"{self.path}.").partition(".")[0]) + span[0] for name in tensors}
        if absent := set(range(*span)) - present:
            raise CorruptDonorError(f"{self.name} has no tensors for layers {sorted(absent)} under {self.path}")
        return tensors

    def require_no_adapter(self) -> None:
        """Check that there is no adapter beside the model.

        Raises:
            NotHFError: There is; transformers loads both.
        """
        if fetch_file(self.name, "adapter_config.json", **self.hub_kwargs):
            raise stored_adapter(self.name)

    def outside(self) -> dict[str, Any]:
        """Return lazy views of all tensors outside the layers; only their bytes are downloaded."""
        outside = re.compile(f"(?!{layer_pattern(self.prefixes, self.path).pattern})")
        return open_part(self.name, outside, "outside-layers", **self.hub_kwargs)


def layer_pattern(prefixes: Sequence[str], path: str, span: Span | None = None) -> re.Pattern[str]:
    """Compile a pattern for names of tensors in layers; its groups are the layer's number and the name in the layer.

    Args:
        prefixes: Names of the base model in a model with a head (`model`, `transformer`), which a checkpoint may omit.
        path: Path of the stack in the base model (`layers`, `h`, `decoder.layers`).
        span: Layers to match; `None`: all.
    """
    number = r"\d+" if span is None else "|".join(map(str, range(*span)))
    return _pattern(prefixes, path, rf"({number})\.(.+)")


def _pattern(prefixes: Sequence[str], path: str, inner: str) -> re.Pattern[str]:
    """Compile a pattern for names of tensors in layers, of which `inner` is what stands behind the path."""
    before = "|".join(re.escape(f"{prefix}.") for prefix in prefixes)
    return re.compile(rf"(?:{before})?{re.escape(path)}\.{inner}")


def open_base(base: str | os.PathLike[str] | PreTrainedModel, **hub_kwargs: Any) -> LiveBase | StoredBase:
    """Find the stack of a base. No weights are read.

    Raises:
        UnsupportedArchitectureError: The base has no stack that can be cut, or is quantized.
        NotHFError: The base is a donor, or has organs or adapters.
        OSError: Its config cannot be read.
    """
    if isinstance(base, PreTrainedModel):
        if hub_kwargs:
            raise TypeError(f"{', '.join(hub_kwargs)}: only for a base that is read from a folder or the Hub")
        if getattr(base, "active_donors", None):
            raise NotHFError("the live model has organs; unload() or merge_and_unload() it, then cut")
        if has_adapters(base):
            raise NotHFError("the live model has adapters; merge or unload them (merge_and_unload()), then cut")
        if getattr(base.config, "quantization_config", None) is not None:
            raise _quantized(base.config.name_or_path or "the live model")
        stack = find_stack(base)
        return LiveBase(base.config.name_or_path or None, layers_config(base.config), stack.path, base, stack)
    try:
        name = os.fspath(base)
    except TypeError as error:
        kind = type(base).__name__
        raise NotHFError(f"base must be a folder, a Hub ID or a model of transformers, not a {kind}") from error
    require_known(hub_kwargs, HUB_KWARGS)
    hub_kwargs["revision"] = resolve_commit(name, hub_kwargs)
    with reading_repo(name):
        config = AutoConfig.from_pretrained(name, **hub_kwargs)
    if isinstance(config, DonorConfig):
        raise NotHFError(f"{name} is a donor, not a base; load it with DonorModel.from_pretrained")
    return stored_base(name, config, hub_kwargs)


def stored_base(name: str, config: PreTrainedConfig, hub_kwargs: Mapping[str, Any]) -> StoredBase:
    """Find the stack of a stored base from its config; `hub_kwargs` have a pinned revision. Raises as `open_base`."""
    stack, commit = meta_twin(config, saved_class(config)).stack, commit_of(hub_kwargs.get("revision"))
    native = layers_config(config)
    quantization = _dequantization(stored := quantization_of(config))
    if stored is not None and quantization is None:
        raise _quantized(name)
    prefixes = (stack.base, *(STORED_NAMES if native is config else TEXT_PREFIXES))
    return StoredBase(name, commit, native, prefixes, stack.path, hub_kwargs, quantization)


def _quantized(name: str | None) -> UnsupportedArchitectureError:
    return UnsupportedArchitectureError(
        f"{name} is quantized; dequantize it first (model.dequantize(), save_pretrained), then cut"
    )


def _dequantization(stored: Any) -> dict[str, Any] | None:
    """Turn a `quantization_config` into one that makes transformers dequantize, if it can (MXFP4, FP8, …)."""
    if stored is None:
        return None
    try:
        known = AutoQuantizationConfig.from_dict(stored if isinstance(stored, dict) else stored.to_dict())
    except Exception:  # an invalid quantization config may raise anything
        return None
    return {**known.to_dict(), "dequantize": True} if hasattr(known, "dequantize") else None


def cut_config(
    base: LiveBase | StoredBase,
    layers: Sequence[int],
    position: int | None,
    mode: str,
    init: str,
    license: str | None = None,
    modules: Modules = ALL,
) -> DonorConfig:
    """Make the config of a donor, with its licence. Arguments as in `DonorModel.from_base`.

    Raises:
        NotHFError: An argument is out of range.
        UnsupportedArchitectureError: No native config describes these layers alone.
    """
    num_layers = base.config.num_hidden_layers
    try:
        ends = (layers.start, layers.stop) if isinstance(layers, range) and layers.step == 1 else layers
        i, j = (operator.index(n) for n in ends)
    except (TypeError, ValueError):
        i, j = -1, -1
    if not 0 <= i < j <= num_layers:
        raise NotHFError(f"layers must be a half-open span (i, j) with 0 <= i < j <= {num_layers}, got {layers!r}")
    if mode not in MODES or init not in INITS:
        raise NotHFError(f"mode must be one of {MODES} and init one of {INITS}, got {mode!r} and {init!r}")
    if problem := parts_problem(modules):
        raise NotHFError(problem)
    if modules != ALL and (mode, init) != ("replace", "copy"):
        raise NotHFError(f"modules={modules!r} needs mode='replace' and init='copy': the rest of the layers stays")
    if position is None:
        position = j if mode == "insert" else i
    last = num_layers if mode == "insert" else num_layers - (j - i)
    if not hasattr(position, "__index__") or not 0 <= position <= last:
        raise NotHFError(f"position must be between 0 and {last} to {mode} {j - i} layers, got {position!r}")
    if (key := place_bound(base.config)) and (mode, position, init) != ("replace", i, "copy"):
        raise NotHFError(
            f"layers of model_type {base.config.model_type!r} have inputs of their own ({key}), and can only be "
            f"replaced in their place; use mode='replace', position={i} and init='copy'"
        )
    organ = spliced_config(base.config, [(base.config, n) for n in range(i, j)])
    require_loadable(organ, is_span=True)
    config = DonorConfig(
        base_model_name_or_path=base.name,
        base_revision=base.revision,
        base_subfolder=base.hub_kwargs.get("subfolder") or None,
        layers=[int(i), int(j)],
        position=int(position),
        mode=mode,
        init=init,
        modules=modules,
        base_config=plain_config(base.config),
        organ_config=plain_config(organ),
        fingerprint=fingerprint(base.config),
        license=license,
    )
    inherit_license(config, **base.hub_kwargs)
    return config


def plain_config(config: PreTrainedConfig) -> dict[str, Any]:
    """Convert a native config to a dict for JSON, without keys that do not concern the layers."""
    values = config.to_dict()
    for key in _STORAGE:
        values.pop(key, None)
    return {"model_type": config.model_type, **values}
