"""Where a language model keeps its layers."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, cast

import transformers
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from not_hf.architecture.releases import CACHES_FOLLOW_STATES
from not_hf.architecture.sharing import require_known_sharing
from not_hf.architecture.tables import UNCUTTABLE
from not_hf.architecture.upstream import carries_states, native_classes
from not_hf.errors import UnsupportedArchitectureError, one_line


@dataclass(frozen=True)
class Stack:
    """Where a live model keeps its layers: their `ModuleList` is `model.<base>.<path>`."""

    model: nn.Module
    base: str  # the base model in the model with a head: model, transformer, bert, …; empty if it has no head
    path: str  # the list in the base model: layers, h, decoder.layers, …

    @property
    def full_path(self) -> str:
        """Path of the list from the model."""
        return f"{self.base}.{self.path}" if self.base else self.path

    @property
    def base_model(self) -> PreTrainedModel:
        """The native base model."""
        return cast(PreTrainedModel, self.model.get_submodule(self.base))

    @property
    def layers(self) -> nn.ModuleList:
        """The layers that are in the stack now."""
        return cast(nn.ModuleList, self.model.get_submodule(self.full_path))

    @property
    def around(self) -> dict[str, nn.Module]:
        """The modules that contain the list, by path from the model, outermost first."""
        steps = self.full_path.split(".")
        paths = [".".join(steps[:n]) for n in range(len(steps))]
        return {path: self.model.get_submodule(path) for path in paths}

    @property
    def outside(self) -> dict[str, nn.Module]:
        """The modules beside the list and beside those that contain it, by path: embeddings, norm, head."""
        inside = {id(module) for module in (*self.around.values(), self.layers)}
        return {
            f"{path}.{name}".lstrip("."): module
            for path, parent in self.around.items()
            for name, module in parent.named_children()
            if id(module) not in inside
        }


def find_stack(model: PreTrainedModel) -> Stack:
    """Find the one `ModuleList` whose length is `config.num_hidden_layers`.

    Raises:
        UnsupportedArchitectureError: With the reason why `model` cannot give or take layers.
    """
    config = layers_config(model.config)
    check_config(config)
    kind = f"model_type {config.model_type!r}"
    if carries_states(model) and not CACHES_FOLLOW_STATES:
        raise UnsupportedArchitectureError(
            f"{kind} has layers with a state, which need a newer release of transformers"
        )
    num_layers = getattr(config, "num_hidden_layers", None)
    paths = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    ]
    paths = [path for path in paths if not any(path.startswith(f"{outer}.") for outer in paths)]
    if len(paths) > 1:
        paths = [p for p in paths if isinstance(next(model.get_submodule(p).children()), GradientCheckpointingLayer)]
    if not paths:
        raise UnsupportedArchitectureError(f"{kind} has no list of num_hidden_layers={num_layers} layers")
    stacks = [stack for path in paths if (stack := _stack_at(model, path, type(config))) is not None]
    if not stacks:
        raise UnsupportedArchitectureError(f"{kind} keeps its layers outside of a base model")
    if len(stacks) > 1:
        found = f"several lists ({', '.join(stack.full_path for stack in stacks)})"
        raise UnsupportedArchitectureError(f"{kind} has {found} of num_hidden_layers={num_layers} layers")
    layers = stacks[0].layers
    distinct = {parameter for layer in layers for parameter in layer.parameters()}
    if len(distinct) < sum(1 for layer in layers for _ in layer.parameters()):
        raise UnsupportedArchitectureError(f"{kind} uses the same weights in several layers; they cannot be cut apart")
    require_known_sharing(config, list(layers))
    return stacks[0]


def _stack_at(model: PreTrainedModel, path: str, config_class: type[PreTrainedConfig]) -> Stack | None:
    """Find the outermost base model with a config of that class around the list at `path`."""
    parts = path.split(".")
    for n in range(len(parts)):
        base = model.get_submodule(".".join(parts[:n]))
        if isinstance(base, PreTrainedModel) and base.base_model is base and type(base.config) is config_class:
            return Stack(model, ".".join(parts[:n]), ".".join(parts[n:]))
    return None


def layers_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of a model's decoder layers: its own, or that of the text model in it.

    Raises:
        UnsupportedArchitectureError: There are several text models.
    """
    try:
        return config if config.is_encoder_decoder else config.get_text_config(decoder=True)
    except ValueError as error:
        raise UnsupportedArchitectureError(f"model_type {config.model_type!r}: {one_line(error, 200)}") from error


def quantization_of(config: PreTrainedConfig) -> Any:
    """How a model's files are quantized, from its config or that of its layers, of which transformers reads both."""
    configs = (config, layers_config(config))
    return next(filter(None, (getattr(each, "quantization_config", None) for each in configs)), None)


def with_layers_config(config: PreTrainedConfig, layers: PreTrainedConfig) -> PreTrainedConfig:
    """A model's config in which `layers` stands for its `layers_config`; the config is not changed."""
    inner = layers_config(config)
    if inner is config:
        return layers
    copied = copy.copy(config)
    setattr(copied, next(key for key, value in vars(config).items() if value is inner), layers)
    return copied


def check_config(config: PreTrainedConfig) -> None:
    """Refuse a model that cannot be spliced, as far as its config tells.

    Raises:
        UnsupportedArchitectureError: With the reason.
    """
    kind = f"model_type {config.model_type!r}"
    if config.is_encoder_decoder:
        raise UnsupportedArchitectureError(f"{kind} is an encoder-decoder; use a decoder-only causal LM")
    for key, reason in UNCUTTABLE.items():
        if value := getattr(config, key, None):
            raise UnsupportedArchitectureError(f"{kind} {reason} ({key}={value!r:.100})")


def is_encoder(config: PreTrainedConfig) -> bool:
    """Whether a config is that of a masked LM, whose layers attend in both directions, not of a causal one.

    For a model type with both heads in transformers (bert), `is_decoder` decides.
    """
    if config.is_encoder_decoder or config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return False
    return config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or getattr(config, "is_decoder", None) is False


def head_class(config: PreTrainedConfig) -> Any:
    """The Auto class that builds a language model from a config: without a head if transformers has none for it."""
    if is_encoder(config):
        return AutoModelForMaskedLM
    is_headless = native_classes(AutoModel, config) and not native_classes(AutoModelForCausalLM, config)
    return AutoModel if is_headless else AutoModelForCausalLM


def require_head(config: PreTrainedConfig, auto_class: Any) -> None:
    """Check that an Auto class builds the models of a config, with the head that it is for.

    Raises:
        UnsupportedArchitectureError: Naming the class to use instead, if there is one.
    """
    kind, usual = f"model_type {config.model_type!r}", head_class(config)
    if auto_class is usual:  # also for a model of somebody's own, which is in no table
        return
    if auto_class not in (AutoModelForMaskedLM, AutoModelForCausalLM):
        if native_classes(auto_class, config):
            return
        raise UnsupportedArchitectureError(f"transformers has no {auto_class.__name__} for {kind}")
    what, other = {
        AutoModelForMaskedLM: ("an encoder", "ForMaskedLM"),
        AutoModelForCausalLM: ("a causal LM", "ForCausalLM"),
        AutoModel: ("no causal LM", "Model" if layers_config(config) is config else "ForImageTextToText"),
    }[usual]
    raise UnsupportedArchitectureError(
        f"{kind} is {what}; use Transplanted{other}, or Auto{other if other == 'Model' else 'Model' + other}"
    )


def saved_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class with a head that a config names as that of its weights; `None` if transformers does not have it."""
    name = str((config.architectures or [""])[0])
    found = getattr(transformers, name, None) if name.isidentifier() else None
    is_native = isinstance(found, type) and issubclass(found, PreTrainedModel) and found.config_class is type(config)
    return found if is_native and found not in native_classes(AutoModel, config) else None
