"""What training an organ needs to know of a model's layers, as one value."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from not_hf.architecture.partial_forward import PartialForward
from not_hf.architecture.releases import is_checkpointing
from not_hf.architecture.stack import find_stack
from not_hf.training.prefix_cache import PrefixCache


@dataclass(frozen=True)
class TrainedStack:
    """The layers of a model in training, and what follows from which of them are trainable."""

    forward: PartialForward
    layers: list[nn.Module]
    around: list[nn.Module]  # modules that contain the stack, outermost first
    outside: list[nn.Module]  # modules beside the layers: embeddings, rotary embeddings, final norm, head
    dtype: torch.dtype  # of the model
    entry: int  # number of the first trainable layer; the number of layers if there is none
    frozen: list[nn.Module]  # those beside the layers and below the entry without trainable parameters
    frozen_parameters: list[nn.Parameter]
    prefix: PrefixCache | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> TrainedStack:
        """Describe a model as it is now.

        Raises:
            UnsupportedArchitectureError: The layers cannot be found, or cannot run in parts.
        """
        stack = find_stack(model)
        layers, around, outside = list(stack.layers), [*stack.around.values()], [*stack.outside.values()]
        entry = next((n for n, layer in enumerate(layers) if is_trainable(layer)), len(layers))
        forward = PartialForward(stack, entry)
        frozen = [module for module in (*outside, *layers[:entry]) if not is_trainable(module)]
        frozen_parameters = [parameter for module in frozen for parameter in module.parameters()]
        return cls(forward, layers, around, outside, model.dtype, entry, frozen, frozen_parameters)

    @property
    def below(self) -> list[nn.Module]:
        """The modules that hidden states at the entry may depend on; of those beside the layers, all but the head."""
        model = self.forward.model
        head = {id(model.get_output_embeddings())} - {id(model.get_input_embeddings())}
        return [*(module for module in self.outside if id(module) not in head), *self.layers[: self.entry]]

    def is_current(self, model: PreTrainedModel) -> bool:
        """Whether it still describes the model."""
        stack = self.forward.stack
        return (
            stack.model is model
            and self.dtype == model.dtype
            and self.layers == list(stack.layers)
            and (self.around, self.outside) == ([*stack.around.values()], [*stack.outside.values()])
            and not any(parameter.requires_grad for parameter in self.frozen_parameters)
        )

    def starting_at(self, hidden: torch.Tensor | None) -> contextlib.AbstractContextManager[None]:
        """Make forward passes in the block start at the entry with these hidden states; if `None`, run them whole."""
        return contextlib.nullcontext() if hidden is None else self.forward.running_from(self.entry, hidden)

    @contextlib.contextmanager
    def learning_at(self, hidden: torch.Tensor | None) -> Iterator[None]:
        """As `starting_at`; with gradient checkpointing, the graph begins at the entry then too.

        That has embeddings require gradients, and frozen layers, which are in eval mode, would keep every activation.
        """
        with self.starting_at(hidden), contextlib.ExitStack() as hooks:
            layers = self.forward.stack.layers
            if 0 < self.entry < len(layers) and is_checkpointing(self.forward.model) and not self._learns_below:
                hooks.callback(layers[0].register_forward_pre_hook(_detach, with_kwargs=True).remove)
                hooks.callback(layers[self.entry - 1].register_forward_hook(_require_gradients).remove)
            yield

    @property
    def _learns_below(self) -> bool:
        """Whether anything that hidden states at the entry may depend on is trainable."""
        own = (parameter for module in self.around for parameter in module.parameters(recurse=False))
        return any(map(is_trainable, self.below)) or any(parameter.requires_grad for parameter in own)

    @property
    def outside_stands(self) -> bool:
        """Whether the modules beside the layers are in the model; while its organs are off, theirs are not."""
        return [*self.forward.stack.outside.values()] == self.outside


def is_trainable(module: nn.Module) -> bool:
    """Whether any parameter of a module is trainable."""
    return any(parameter.requires_grad for parameter in module.parameters())


def _detach(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Have a layer take hidden states without their graph."""
    if args:
        return (args[0].detach(), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": kwargs["hidden_states"].detach()}


def _require_gradients(layer: nn.Module, args: Any, output: Any) -> None:
    """Have the output of a layer require gradients, without which a reentrant checkpoint behind it has none."""
    (output[0] if isinstance(output, tuple) else output).requires_grad_()
