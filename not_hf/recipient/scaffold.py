"""A scaffold: a base without its layers, for an organ to be trained alone between embeddings and head.

Independent training in the sense of arXiv 2601.13580, for who cannot run the whole base. It costs the bytes and the
memory of what stands outside of the layers, and of the organ.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from not_hf.architecture.stack import find_stack
from not_hf.architecture.twin import meta_twin
from not_hf.architecture.upstream import HUB_KWARGS
from not_hf.donor.cutting import StoredBase, stored_base
from not_hf.donor.loading import common_dtype
from not_hf.errors import NotHFError

# Arguments of `from_pretrained` that choose or convert whole files; here a few tensors of plain ones are read.
_OF_WHOLE_FILES = ("gguf_file", "key_mapping", "quantization_config", "variant")


def wants_scaffold(scaffold: str, recipient: Any, base_kwargs: Mapping[str, Any]) -> bool:
    """Whether `scaffold` asks for a base without its layers; the other arguments are those beside it.

    Raises:
        NotHFError: It is neither `"full"` nor `"minimal"`, or something else was asked for that a scaffold cannot be.
    """
    if scaffold not in ("full", "minimal"):
        raise NotHFError(f"scaffold must be 'full' or 'minimal', got {scaffold!r}")
    if scaffold == "full":
        return False
    if isinstance(recipient, nn.Module):
        raise NotHFError(
            "scaffold='minimal' is read from files, and this recipient is live; name its folder or Hub ID"
        )
    if odd := [key for key in _OF_WHOLE_FILES if base_kwargs.get(key) is not None]:
        raise NotHFError(f"scaffold='minimal' reads parts of plain safetensors files; leave out {', '.join(odd)}")
    return True


def load_scaffold(base: str, config: PreTrainedConfig, **kwargs: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load a base with an empty stack. Of its checkpoint only what stands outside of the layers is read.

    Its class and config are the base's, as if every layer had been taken out of the live model.

    Args:
        base: Folder or Hub ID.
        config: The base's native config.
        **kwargs: As in `PreTrainedModel.from_pretrained`.

    Returns:
        The model in eval mode, and transformers' `output_loading_info`.

    Raises:
        UnsupportedArchitectureError: The base has no stack, or is quantized for good.
        OSError: It cannot be read.
    """
    hub_kwargs = {key: kwargs.pop(key) for key in HUB_KWARGS if key in kwargs}
    stored = stored_base(base, config, hub_kwargs)
    views, native, config = stored.outside(), type(meta_twin(config).model), copy.deepcopy(config)
    dtype = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None) or "auto"
    if dtype == "auto":
        dtype = config.dtype or common_dtype(views)
    kwargs.pop("config", None)
    if stored.quantization is not None:
        config.quantization_config = stored.quantization
    if native.can_generate():
        kwargs.setdefault("generation_config", _generation_config(stored))
    model, info = _hollow(native, stored.name).from_pretrained(
        None, config=config, state_dict=views, dtype=dtype, output_loading_info=True, **kwargs
    )
    model.__class__ = native
    return model, info


def _hollow(native: Any, name: str) -> Any:
    """A native class whose models have no layers; transformers makes them without memory and then fills them."""

    def init(self: Any, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        config.name_or_path = name  # transformers knows no name of what it loads from tensors
        native.__init__(self, config, *args, **kwargs)
        del find_stack(self).layers[:]

    names = {"__module__": native.__module__, "__qualname__": native.__qualname__}
    return type(native.__name__, (native,), {**names, "config_class": native.config_class, "__init__": init})


def _generation_config(base: StoredBase) -> GenerationConfig | None:
    try:
        return GenerationConfig.from_pretrained(base.name, **base.hub_kwargs)
    except OSError:  # there is none
        return None
