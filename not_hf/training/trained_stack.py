"""What training an organ needs to know of a model's layers, as one value."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from not_hf.architecture.stack import Stack, find_stack
from not_hf.training.partial_forward import PartialForward
from not_hf.training.prefix_cache import PrefixCache


@dataclass(frozen=True)
class TrainedStack:
    """The layers of a model in training, and what follows from which of them are trainable."""

    forward: PartialForward
    layers: list[nn.Module]
    outside: list[nn.Module]  # modules beside the layers: embeddings, rotary embeddings, final norm, head
    dtype: torch.dtype  # of the model
    entry: int  # number of the first trainable layer; the number of layers if there is none
    frozen: list[nn.Module]  # those of `below` without trainable parameters
    prefix: PrefixCache | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> TrainedStack:
        """Describe a model as it is now.

        Raises:
            UnsupportedArchitectureError: The layers cannot be found, or cannot run in parts.
        """
        forward = PartialForward(find_stack(model))
        layers, outside = list(forward.stack.layers), _outside(forward.stack)
        entry = next((n for n, layer in enumerate(layers) if is_trainable(layer)), len(layers))
        frozen = [module for module in (*outside, *layers[:entry]) if not is_trainable(module)]
        return cls(forward, layers, outside, model.dtype, entry, frozen)

    @property
    def below(self) -> list[nn.Module]:
        """The modules that hidden states at the entry may depend on."""
        return [*self.outside, *self.layers[: self.entry]]

    def is_current(self, model: PreTrainedModel) -> bool:
        """Whether it still describes the model."""
        stack = self.forward.stack
        return stack.model is model and self.dtype == model.dtype and self.layers == list(stack.layers)

    def starting_at(self, hidden: torch.Tensor | None) -> contextlib.AbstractContextManager[None]:
        """Make forward passes in the block start at the entry with these hidden states; if `None`, run them whole."""
        return contextlib.nullcontext() if hidden is None else self.forward.running_from(self.entry, hidden)


def is_trainable(module: nn.Module) -> bool:
    """Whether any parameter of a module is trainable."""
    return any(parameter.requires_grad for parameter in module.parameters())


def _outside(stack: Stack) -> list[nn.Module]:
    found: list[nn.Module] = []
    parent: nn.Module = stack.model
    for step in stack.full_path.split("."):
        found += [module for name, module in parent.named_children() if name != step]
        parent = getattr(parent, step)
    return found
