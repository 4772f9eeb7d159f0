"""What is done to layers themselves: laying them bare, silencing them, fitting them into another model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from not_hf.architecture.quantization import computes
from not_hf.architecture.stack import Stack
from not_hf.architecture.tables import OUTPUT_PROJECTIONS
from not_hf.architecture.upstream import copy_checkpointing, swapped_layers
from not_hf.errors import CorruptDonorError, UnsupportedArchitectureError, one_line

# modules beside the layers that do not touch hidden states: they say where tokens stand
POSITIONAL = ("rotary", "rope")


class Passthrough(nn.Module):
    """Stands where a stripped module was: hands hidden states on, answers anything else with a zero."""

    def forward(self, x: Any = None, *args: Any, inputs_embeds: Any = None, **kwargs: Any) -> torch.Tensor:
        """`x` itself when it is `(batch, seq, hidden)`, else a zero without dimensions.

        Embeddings of encoders are called with no ids, and with the hidden states second or by name.
        """
        if x is None:
            x = next((arg for arg in (inputs_embeds, *args) if isinstance(arg, torch.Tensor)), None)
        if isinstance(x, torch.Tensor) and x.is_floating_point() and x.ndim > 2:
            return x
        return torch.zeros((), device=x.device if isinstance(x, torch.Tensor) else None)


def strip_to_layers(stack: Stack) -> None:
    """Put a `Passthrough` in the place of everything in the base model but its layers and its rotary embeddings."""
    parent: nn.Module = stack.base_model
    for step in stack.path.split("."):
        for name, _ in list(parent.named_children()):
            if name != step and not any(word in name for word in POSITIONAL):
                setattr(parent, name, Passthrough())
        parent = getattr(parent, step)


@torch.no_grad()
def check_bare(organ: nn.Module, stack: Stack, hidden: torch.Tensor) -> None:
    """Check that a stripped base model is nothing but its layers: without them hidden states go through unchanged.

    Args:
        organ: Takes `inputs_embeds`.
        stack: Its layers, left out for the moment.
        hidden: Any hidden states, `(batch, seq, hidden)`.

    Raises:
        UnsupportedArchitectureError: Something beside the layers changes hidden states, or cannot do without them.
    """
    kind = f"model_type {stack.base_model.config.model_type!r}"
    try:
        with swapped_layers(stack.layers, []):
            found = organ(inputs_embeds=hidden).last_hidden_state
    except Exception as error:  # native forwards raise anything on what they do not expect
        reason = one_line(error, 200)
        raise UnsupportedArchitectureError(f"layers of {kind} cannot be run without the rest: {reason}") from error
    if not torch.equal(found, hidden):
        raise UnsupportedArchitectureError(f"{kind} changes hidden states outside of its layers")


def output_projections(layer: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters through which `layer` writes to the residual stream, biases included, norms never.

    Yields:
        Name below the layer, and the parameter.
    """
    for name, parameter in layer.named_parameters():
        *path, leaf = name.split(".")
        owner = path[-1] if leaf in ("weight", "bias") and path else leaf
        owners = (owner, ".".join((*path[-2:-1], owner)))
        branch = "attention" if path and "att" in path[0].lower() else "mlp"
        if any(each in OUTPUT_PROJECTIONS[branch] for each in owners):
            yield name, parameter


@torch.no_grad()
def silence(layer: nn.Module) -> None:
    """Zero what the layer writes to the residual stream."""
    for _, parameter in output_projections(layer):
        parameter.zero_()


def settle(layer: nn.Module, neighbour: nn.Module, device: torch.device | None = None) -> None:
    """Move a layer to where a layer of the recipient is: device, dtype of each parameter.

    Args:
        layer: The layer.
        neighbour: The recipient's. Where its parameter is packed, ours takes the dtype that the layer computes in.
        device: Where the neighbour runs, when its weights rest elsewhere.
    """
    theirs = {name: p for name, p in neighbour.named_parameters() if computes(p)}
    fallback = next(iter(theirs.values()))
    for name, parameter in layer.named_parameters():
        like = theirs.get(name, fallback)
        parameter.data = parameter.data.to(device=device or like.device, dtype=like.dtype)
        parameter.grad = None
    for buffer in layer.buffers():
        buffer.data = buffer.data.to(device=device or fallback.device)


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity, found without a second tensor of its size."""
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor.detach()))).all())


def require_finite(layers: Iterable[nn.Module], name: str, known: Mapping[nn.Parameter, torch.dtype]) -> None:
    """Check what layers hold, after they have taken the recipient's dtype.

    Args:
        layers: Of an organ.
        name: Of the organ.
        known: Parameters that were finite before, each with the dtype it had then.

    Raises:
        CorruptDonorError: Naming the first tensor that holds NaN or infinity.
    """
    for n, layer in enumerate(layers):
        for key, parameter in layer.named_parameters():
            if known.get(parameter) != parameter.dtype and not is_finite(parameter):
                raise CorruptDonorError(f"organ {name!r}: non-finite values in layer {n} {key} as {parameter.dtype}")


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
        copy_checkpointing(module, reference.get(name, module))


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode inside the block; afterwards each module has the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training
