"""Twins: native models on the meta device, with every attribute and shape, and no memory."""

from __future__ import annotations

import copy
import functools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from not_hf.architecture.differences import LayerDescription, describe, outer_attributes
from not_hf.architecture.releases import make_config
from not_hf.architecture.stack import Stack, check_config, find_stack, head_class, is_encoder, layers_config
from not_hf.architecture.tables import NAMES
from not_hf.architecture.upstream import BUILDING, attention_of, built_whole
from not_hf.errors import UnsupportedArchitectureError, one_line


@dataclass(frozen=True)
class Twin:
    """A native language model on the meta device, with its layers cached. It is shared: do not change it."""

    model: PreTrainedModel
    is_chosen: bool = True  # its class by the config, and not by the caller

    @functools.cached_property
    def stack(self) -> Stack:
        """Where its layers are.

        Raises:
            UnsupportedArchitectureError: As in `find_stack`.
        """
        return find_stack(self.model)

    @functools.cached_property
    def descriptions(self) -> list[LayerDescription]:
        """What each of its layers is built of; raises as `stack` does."""
        return [describe(layer) for layer in self.stack.layers]

    @functools.cached_property
    def outer_attributes(self) -> dict[tuple[str, str], Any]:
        """Plain attributes of the modules outside its stack; raises as `stack` does."""
        return outer_attributes(self.stack)


def meta_twin(
    config: PreTrainedConfig, model_class: type[PreTrainedModel] | None = None, is_span: bool = False
) -> Twin:
    """The native language model of `config` on the meta device: every attribute and shape, no memory.

    The last few are cached. `is_span` is as in `require_loadable`.

    Raises:
        UnsupportedArchitectureError: transformers has no language model for this config, or cannot build it.
    """
    check_config(layers_config(config))
    values = {key: value for key, value in config.to_dict().items() if key not in NAMES}
    key = repr((is_span, type(config), attention_of(config) or "sdpa", sorted(values.items())))
    with BUILDING:
        twin = next((twin for k, twin in _twins if k == key and _serves_as(twin, model_class)), None)
        if twin is None:
            config = copy.deepcopy(config)
            for each in (config, layers_config(config)):
                if isinstance(each.dtype, str):  # save_pretrained leaves it so, and some models compute with it
                    each.dtype = getattr(torch, each.dtype)
            require_loadable(layers_config(config), is_span)
            with built_whole(hollow=True), torch.device("meta"):
                twin = Twin(build(model_class or head_class(config).from_config, config), model_class is None)
            _twins.append((key, twin))
    return twin


_twins: deque[tuple[str, Twin]] = deque(maxlen=8)  # by the content of the config


def _serves_as(twin: Twin, model_class: type[PreTrainedModel] | None) -> bool:
    """Whether a twin is of that class; `None`: whether it is a language model, and not one without a head."""
    if model_class is not None:
        return type(twin.model) is model_class
    return twin.is_chosen or twin.model.get_output_embeddings() is not None


def require_loadable(config: PreTrainedConfig, is_span: bool = False) -> None:
    """Check that a config can be read back from a file.

    Args:
        config: Of a whole model, or of a span.
        is_span: That it is of a span, which may end in any layer.

    Raises:
        UnsupportedArchitectureError: Its class refuses or changes its values.
    """
    kind, values = f"model_type {config.model_type!r}", config.to_dict()
    try:
        made = make_config(type(config), {key: value for key, value in values.items() if key != "model_type"}, is_span)
    except Exception as error:  # a native config may raise anything
        raise UnsupportedArchitectureError(
            f"no config of {kind} describes these layers: {one_line(error, 300)}"
        ) from error
    last, becomes = ((getattr(each, "layer_types", None) or [None])[-1] for each in (config, made))
    if last != becomes:
        raise UnsupportedArchitectureError(f"the last layer of {kind} must be {becomes}, and here it is {last}")


def build(constructor: Callable[..., PreTrainedModel], config: PreTrainedConfig, **kwargs: Any) -> PreTrainedModel:
    """Call a native constructor; any error that it raises becomes an `UnsupportedArchitectureError` in one line."""
    try:
        return constructor(config, **kwargs)
    except Exception as error:
        kind = "masked" if is_encoder(config) else "causal"
        raise UnsupportedArchitectureError(
            f"no {kind} LM can be built from model_type {config.model_type!r}: {one_line(error, 300)}"
        ) from error
