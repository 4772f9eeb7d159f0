"""Where a language model keeps its layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from not_hf.architecture.releases import is_heterogeneous
from not_hf.architecture.tables import SHARED_STATE
from not_hf.architecture.upstream import is_recurrent
from not_hf.errors import UnsupportedArchitectureError


@dataclass(frozen=True)
class Stack:
    """Where a live model keeps its layers: their `ModuleList` is `model.<base>.<path>`."""

    model: nn.Module
    base: str  # the base model in the model with a head: model, transformer, bert, …
    path: str  # the list in the base model: layers, h, decoder.layers, …

    @property
    def full_path(self) -> str:
        """Path of the list from the model."""
        return f"{self.base}.{self.path}"

    @property
    def base_model(self) -> PreTrainedModel:
        """The native base model."""
        return cast(PreTrainedModel, self.model.get_submodule(self.base))

    @property
    def layers(self) -> nn.ModuleList:
        """The layers that are in the stack now."""
        return cast(nn.ModuleList, self.model.get_submodule(self.full_path))


def find_stack(model: PreTrainedModel) -> Stack:
    """Find the one `ModuleList` whose length is `config.num_hidden_layers`.

    Raises:
        UnsupportedArchitectureError: With the reason why `model` cannot give or take layers.
    """
    config = model.config
    check_config(config)
    kind = f"model_type {config.model_type!r}"
    if is_recurrent(model):
        raise UnsupportedArchitectureError(f"{kind} carries a recurrent state that has no place in a KV cache")
    num_layers = getattr(config, "num_hidden_layers", None)
    paths = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    ]
    paths = [path for path in paths if not any(path.startswith(f"{outer}.") for outer in paths)]
    if len(paths) > 1:
        paths = [p for p in paths if isinstance(next(model.get_submodule(p).children()), GradientCheckpointingLayer)]
    if len(paths) != 1:
        found = "no list" if not paths else "several lists (" + ", ".join(paths) + ")"
        raise UnsupportedArchitectureError(f"{kind} has {found} of num_hidden_layers={num_layers} layers")
    parts = paths[0].split(".")
    for n in range(1, len(parts)):
        base = model.get_submodule(".".join(parts[:n]))
        if isinstance(base, PreTrainedModel):
            if base.config is not config:
                raise UnsupportedArchitectureError(f"{kind} has its layers under another config; load the text model")
            return Stack(model, ".".join(parts[:n]), ".".join(parts[n:]))
    raise UnsupportedArchitectureError(f"{kind} keeps its layers outside of a base model")


def check_config(config: PreTrainedConfig) -> None:
    """Refuse a model that cannot be spliced, as far as its config tells.

    Raises:
        UnsupportedArchitectureError: With the reason.
    """
    kind = f"model_type {config.model_type!r}"
    if config.is_encoder_decoder:
        raise UnsupportedArchitectureError(f"{kind} is an encoder-decoder; use a decoder-only causal LM")
    if any(getattr(config, key, None) for key in SHARED_STATE):
        raise UnsupportedArchitectureError(f"{kind} shares keys and values between layers; they cannot be cut apart")
    if is_heterogeneous(config):
        raise UnsupportedArchitectureError(f"{kind} uses per_layer_config, which not_hf cannot splice yet")


def is_encoder(config: PreTrainedConfig) -> bool:
    """Whether a config is that of a masked LM, whose layers attend in both directions, not of a causal one.

    For a model type with both heads in transformers (bert), `is_decoder` decides.
    """
    if config.is_encoder_decoder or config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return False
    return config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or getattr(config, "is_decoder", None) is False


def head_class(config: PreTrainedConfig) -> Any:
    """The Auto class that builds a model with a language-modelling head from a config."""
    return AutoModelForMaskedLM if is_encoder(config) else AutoModelForCausalLM


def task_of(config: PreTrainedConfig) -> str:
    """The Hub's name for the task of a language model of this config."""
    return "fill-mask" if is_encoder(config) else "text-generation"
