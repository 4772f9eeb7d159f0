"""What is done to layers themselves: laying them bare, silencing them, fitting them into another model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from not_hf.anatomy import Stack, output_projections


class Passthrough(nn.Module):
    """Stands where a stripped module was: hands hidden states on, answers anything else with a zero."""

    def forward(self, x: Any = None, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`x` itself when it is `(batch, seq, hidden)`, else a zero without dimensions."""
        if isinstance(x, torch.Tensor) and x.is_floating_point() and x.ndim > 2:
            return x
        return torch.zeros((), device=x.device if isinstance(x, torch.Tensor) else None)


def strip_to_layers(base: nn.Module, stack: Stack) -> None:
    """Put a `Passthrough` in the place of everything beside the stack that owns parameters or drops activations."""
    on_path = [module for module in base.modules() if any(inner is stack.owner for inner in module.modules())]
    for parent in on_path:
        for name, child in list(parent.named_children()):
            if child is stack.layers or any(child is module for module in on_path):
                continue
            if isinstance(child, nn.Dropout) or next(child.parameters(), None) is not None:
                setattr(parent, name, Passthrough())


@torch.no_grad()
def silence(layer: nn.Module) -> None:
    """Zero what the layer writes to the residual stream."""
    for _, parameter in output_projections(layer):
        parameter.zero_()


def settle(layer: nn.Module, neighbour: nn.Module, is_trainable: bool) -> None:
    """Move a layer to where a layer of the recipient is: device, dtype of each parameter; and freeze it or not."""
    theirs = {name: p for name, p in neighbour.named_parameters() if p.is_floating_point()}
    fallback = next(iter(theirs.values()))
    for name, parameter in layer.named_parameters():
        like = theirs.get(name, fallback)
        parameter.data = parameter.data.to(device=like.device, dtype=like.dtype)
        parameter.grad = None
        parameter.requires_grad_(is_trainable)
    for buffer in layer.buffers():
        buffer.data = buffer.data.to(device=fallback.device)


def adopt(layer: nn.Module, config: PreTrainedConfig, reference: Mapping[str, nn.Module], training: bool) -> None:
    """Give a layer that enters a stack what its neighbours have: the config, train mode, gradient checkpointing.

    Args:
        layer: The layer.
        config: The recipient's.
        reference: A layer that stood in the stack so far, as modules by name.
        training: The recipient's mode.
    """
    layer.train(training)
    for name, module in layer.named_modules():
        if isinstance(vars(module).get("config"), PreTrainedConfig):
            module.config = config
        neighbour = vars(reference.get(name, module))
        for key in ("gradient_checkpointing", "_gradient_checkpointing_func"):
            if key in neighbour:
                setattr(module, key, neighbour[key])


def forget_capture_hooks(roots: Iterable[nn.Module]) -> None:
    """Let transformers install its output-capturing hooks anew: it does so once per model, for the layers of then."""
    for module in (module for root in roots for module in root.modules()):
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__name__", "") == "output_capturing_hook":
                del module._forward_hooks[key]
        if "_output_capturing_hooks_installed" in vars(module):
            vars(module)["_output_capturing_hooks_installed"] = False
