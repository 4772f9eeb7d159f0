"""The scale of an organ, put into its weights, so that any scale merges natively.

An inserted organ's output projections are multiplied by it. A replacement moves along the line from the layers that it
replaces, at scale 0, to its own, at scale 1.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from not_hf.architecture.devices import execution_device
from not_hf.architecture.layers import output_projections
from not_hf.architecture.stack import Stack
from not_hf.architecture.upstream import view_with_layers
from not_hf.errors import NotHFError, UnsupportedArchitectureError


def scale_problem(scale: Any) -> str | None:
    """Why an organ cannot have this scale; `None` if it can."""
    if not isinstance(scale, (int, float)) or isinstance(scale, bool) or not math.isfinite(scale):
        return f"scale must be a finite number, got {scale!r:.200}"
    return None


def scaled_parameters(layers: Sequence[nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that the scale of an inserted organ multiplies, named `<layer>.<name below it>`."""
    for n, layer in enumerate(layers):
        for name, parameter in output_projections(layer):
            yield f"{n}.{name}", parameter


def scaled(original: torch.Tensor, scale: float, replaced: torch.Tensor | None = None) -> torch.Tensor:
    """The value of a parameter at a scale.

    Args:
        original: Its value at scale 1.
        scale: The scale; at 1 and 0 the value is that of `original` and `replaced` bit for bit.
        replaced: That of the layer which is replaced; `None` for an inserted organ.
    """
    if replaced is None:
        return original * scale
    if scale in (0, 1):
        return original if scale else replaced.to(original)
    start = replaced.to(original.device, torch.float32)
    return (start + scale * (original.float() - start)).to(original.dtype)


def unscaled(
    tensor: torch.Tensor, original: torch.Tensor, scale: float, replaced: torch.Tensor | None = None
) -> torch.Tensor:
    """The value of a parameter at scale 1.

    Args:
        tensor: The parameter at `scale`.
        original: Its value when the scale was set.
        scale: The scale that was set then.
        replaced: As in `scaled`.

    Returns:
        `original` itself unless the parameter was trained since.

    Raises:
        NotHFError: It was trained at scale 0, so its value at scale 1 is unknown.
    """
    if torch.equal(tensor, scaled(original, scale, replaced)):
        return original
    if scale == 0:
        raise NotHFError("an organ was trained at scale 0, which loses its weights at scale 1; train at another scale")
    if replaced is None:
        return tensor / scale
    start = replaced.to(tensor.device, torch.float32)
    return (start + (tensor.float() - start) / scale).to(tensor.dtype)


def require_scalable(stack: Stack, layers: Sequence[nn.Module]) -> None:
    """Check that layers write half as much when their output projections are halved, and nothing when they are zero.

    A norm behind the projections would undo a scale, and a projection that `OUTPUT_PROJECTIONS` lacks would stay as it
    is. Checked on a copy of one layer of each kind with random projections, branch by branch, called as the model
    calls its first layer.

    Raises:
        UnsupportedArchitectureError: A layer does not.
    """
    for n in first_of_each_kind(layers):
        _require_scalable(stack, layers[n])


def first_of_each_kind(layers: Sequence[nn.Module]) -> list[int]:
    """Return the places of layers that have other parameters than all layers before them."""
    kinds: dict[tuple[str, ...], int] = {}
    for n, layer in enumerate(layers):
        kinds.setdefault(tuple(name for name, _ in layer.named_parameters()), n)
    return list(kinds.values())


@torch.no_grad()
def _require_scalable(stack: Stack, layer: nn.Module) -> None:
    probe = copy.deepcopy(layer).eval()
    args, kwargs = _layer_call(stack, probe)
    generator = torch.Generator().manual_seed(0)
    drawn = {
        name: 0.02 * torch.randn(parameter.shape, generator=generator, device="cpu").to(parameter)
        for name, parameter in output_projections(probe)
    }

    def written(branch: str, scale: float) -> torch.Tensor:
        for name, parameter in output_projections(probe):
            parameter.copy_(drawn[name] * (scale if name.startswith(branch) else 0))
        out = probe(*args, **kwargs)
        return ((out[0] if isinstance(out, (tuple, list)) else out) - _hidden(args, kwargs)).float()

    kind = f"model_type {stack.base_model.config.model_type!r}"
    for branch in {name.partition(".")[0] for name in drawn}:
        whole, half = written(branch, 1.0), written(branch, 0.5)
        if not (half - 0.5 * whole).norm() <= 0.1 * whole.norm() or not whole.any():
            raise UnsupportedArchitectureError(
                f"layers of {kind} do not follow a scale of their output projections ({branch}): a norm undoes it"
            )
    if written("", 0.0).any():
        raise UnsupportedArchitectureError(
            f"layers of {kind} do not follow a scale: with all known output projections at zero they still write"
        )


class _CalledError(Exception):
    """Carries the arguments of a call out of the model."""


def _layer_call(stack: Stack, probe: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with which a model calls its first layer, for a few tokens; in a view of it, that is `probe`."""

    def catch(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _CalledError(args, kwargs)

    hook = probe.register_forward_pre_hook(catch, with_kwargs=True)
    base = stack.base_model
    embeddings: Any = base.get_input_embeddings()
    view = view_with_layers(base, stack.path, [probe])
    try:
        if not hasattr(embeddings, "weight"):  # of a donor
            generator = torch.Generator().manual_seed(0)
            hidden = torch.randn(1, 4, base.config.hidden_size, generator=generator, device="cpu")
            view(inputs_embeds=hidden.to(base.device, base.dtype), use_cache=False)  # (batch=1, seq=4, hidden)
        device = execution_device(embeddings) or embeddings.weight.device
        view(input_ids=torch.arange(4, device=device)[None], use_cache=False)  # (batch=1, seq=4)
    except _CalledError as called:
        return called.args
    finally:
        hook.remove()
    raise UnsupportedArchitectureError(f"model_type {base.config.model_type!r} does not run its layers")


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    return args[0] if args else kwargs["hidden_states"]  # (batch, seq, hidden)
