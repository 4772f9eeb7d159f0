"""Scaffolds: a base without layers, to train an organ between its embeddings and head.

This is the independent training of arXiv 2601.13580. It reads and holds only the organ and the rest of the base.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from not_hf.architecture.stack import find_stack
from not_hf.architecture.twin import meta_twin
from not_hf.architecture.upstream import HUB_KWARGS
from not_hf.donor.cutting import stored_base
from not_hf.donor.loading import common_dtype
from not_hf.errors import NotHFError

# Arguments of `from_pretrained` that choose or convert whole files; a scaffold reads parts of files.
_OF_WHOLE_FILES = ("gguf_file", "key_mapping", "quantization_config", "variant")


def wants_scaffold(scaffold: str, recipient: Any, base_kwargs: Mapping[str, Any]) -> bool:
    """Whether `scaffold` is `"minimal"`, checked against the other arguments of `from_pretrained`.

    Raises:
        NotHFError: `scaffold` is unknown, or contradicts another argument.
    """
    if scaffold not in ("full", "minimal"):
        raise NotHFError(f"scaffold must be 'full' or 'minimal', got {scaffold!r}")
    if scaffold == "full":
        return False
    if isinstance(recipient, nn.Module):
        raise NotHFError("scaffold='minimal' needs files, and this recipient is live; name its folder or Hub ID")
    if unusable := [key for key in _OF_WHOLE_FILES if base_kwargs.get(key) is not None]:
        raise NotHFError(f"scaffold='minimal' reads parts of safetensors files; leave out {', '.join(unusable)}")
    return True


def load_scaffold(base: str, config: PreTrainedConfig, **kwargs: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load a base with an empty stack, and transformers' `output_loading_info`; only other tensors are read.

    Raises:
        UnsupportedArchitectureError: The base has no stack, or its quantization cannot be undone.
        OSError: The base cannot be read.
    """
    hub_kwargs = {key: kwargs.pop(key) for key in HUB_KWARGS if key in kwargs}
    stored = stored_base(base, config, hub_kwargs)
    views, native, config = stored.outside(), type(meta_twin(config).model), copy.deepcopy(config)
    dtype = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None) or "auto"
    if dtype == "auto":
        dtype = config.dtype or common_dtype(views)
    if stored.quantization is not None:
        config.quantization_config = stored.quantization
    if native.can_generate():
        with contextlib.suppress(OSError):  # the base has none
            generation_config = GenerationConfig.from_pretrained(stored.name, **stored.hub_kwargs)
            kwargs.setdefault("generation_config", generation_config)
    model, info = _hollow(native, stored.name).from_pretrained(
        None, config=config, state_dict=views, dtype=dtype, output_loading_info=True, **kwargs
    )
    model.__class__ = native
    return model, info


def _hollow(native: Any, name: str) -> Any:
    """Return a subclass of a native class whose models have no layers."""

    def init(self: Any, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        config.name_or_path = name  # transformers does not set it when it loads from a state dict
        native.__init__(self, config, *args, **kwargs)
        del find_stack(self).layers[:]

    names = {"__module__": native.__module__, "__qualname__": native.__qualname__}
    return type(native.__name__, (native,), {**names, "config_class": native.config_class, "__init__": init})
