"""What is done to layers themselves: silencing them, fitting them into another model, checking their values."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from not_hf.architecture.adapters import own_parameters
from not_hf.architecture.master_weights import hold_master_weights
from not_hf.architecture.tables import BRANCHES, OUTPUT_PROJECTIONS
from not_hf.architecture.upstream import copy_checkpointing
from not_hf.errors import CorruptDonorError


def output_projections(layer: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters through which `layer` writes to the residual stream, biases included, norms never.

    Yields:
        Name below the layer, and the parameter.
    """
    for name, parameter in own_parameters(layer):
        *path, leaf = name.split(".")
        owner = path[-1] if leaf in ("weight", "bias") and path else leaf
        owners = (owner, ".".join((*path[-2:-1], owner)))
        if any(each in OUTPUT_PROJECTIONS[branch_of(path[0] if path else "")] for each in owners):
            yield name, parameter


def branch_of(name: str) -> str:
    """The branch of a layer to which a module directly in it belongs, by its name: a key of `OUTPUT_PROJECTIONS`."""
    return next((b for b, marks in BRANCHES.items() if any(mark in name.lower() for mark in marks)), "mlp")


@torch.no_grad()
def silence(layer: nn.Module, written: Callable[[], torch.Tensor]) -> None:
    """Have a layer write nothing to the residual stream, in a way from which training can start.

    Its output projections become zero. If a norm behind them blows up any small step of theirs to full size, the gain
    of that norm becomes zero instead. A layer that writes something in either case is left so.

    Args:
        layer: The layer.
        written: Runs the layer, and returns what it writes.
    """
    projections = [parameter for _, parameter in output_projections(layer)]
    originals, whole = [parameter.clone() for parameter in projections], written().norm()
    for parameter in projections:
        parameter.mul_(1e-3)
    if not written().norm() > 0.1 * whole:
        for parameter in projections:
            parameter.zero_()
        return
    for parameter, original in zip(projections, originals, strict=True):
        parameter.copy_(original)
    gains = [p for name, p in layer.named_parameters() if "norm" in name and name.endswith("weight")]
    originals = [gain.clone() for gain in gains]
    for zero in (0.0, -1.0):  # Gemma's norms multiply by 1 + gain
        for gain in gains:
            gain.fill_(zero)
        if not written().any():
            break
    for gain, original in zip(gains, originals, strict=True):
        zeroed = gain.clone()
        gain.copy_(original)
        if written().any():  # this one is needed
            gain.copy_(zeroed)


def computes(parameter: torch.Tensor) -> bool:
    """Whether a parameter's dtype is one that layers compute in: packed integers and 8-bit floats are storage."""
    return parameter.is_floating_point() and parameter.element_size() > 1


def settle(
    layer: nn.Module,
    neighbour: nn.Module,
    device: torch.device | None = None,
    master_weights: bool = False,
    kept: Collection[str] = (),
) -> None:
    """Give a layer the device of a layer of the recipient and, parameter by parameter, its dtype.

    Args:
        layer: The layer.
        neighbour: The recipient's layer. Instead of a packed dtype, the one that it computes in is taken.
        device: Where the neighbour runs, if its weights are elsewhere.
        master_weights: Keep float32 weights where that dtype has 16 bits, and compute in that dtype.
        kept: Names of parameters that stay as they are.
    """
    own = [(name, parameter) for name, parameter in layer.named_parameters() if name not in kept]
    theirs = {name: p for name, p in neighbour.named_parameters() if computes(p)}
    fallback = next(iter(theirs.values()))
    likes = {name: theirs.get(name, fallback) for name, _ in own}
    masters = {name: like.dtype for name, like in likes.items() if master_weights and like.element_size() == 2}
    for name, parameter in own:
        dtype = torch.float32 if name in masters else likes[name].dtype
        parameter.data = parameter.data.to(device=device or likes[name].device, dtype=dtype)
        parameter.grad = None
    for buffer in layer.buffers():
        buffer.data = buffer.data.to(device=device or fallback.device)
    if masters:
        hold_master_weights(layer, {*kept, *likes} - masters.keys(), computes_in=next(iter(masters.values())))


def is_dropout(module: nn.Module, key: str) -> bool:
    """Whether an attribute of a module is a dropout rate, which is for training only."""
    return "dropout" in key or (key == "p" and isinstance(module, nn.Dropout))


def follow_dropout(layer: nn.Module, neighbour: nn.Module) -> None:
    """Give a layer the dropout rates of a layer of the recipient, whose config the caller may have changed."""
    theirs = {name: vars(module) for name, module in neighbour.named_modules()}
    for name, module in layer.named_modules():
        own, other = vars(module), theirs.get(name, {})
        own.update({key: other[key] for key in own.keys() & other.keys() if is_dropout(module, key)})


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity; computed without a second tensor of its size."""
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor.detach()))).all())


def require_finite(layers: Iterable[nn.Module], name: str, known: Mapping[nn.Parameter, torch.dtype]) -> None:
    """Check that the values of layers are finite, after a cast to the recipient's dtype.

    Args:
        layers: Of an organ.
        name: Of the organ.
        known: Parameters that were finite before the cast, each with its dtype then.

    Raises:
        CorruptDonorError: With the name of the first tensor that holds NaN or infinity.
    """
    for n, layer in enumerate(layers):
        for key, parameter in layer.named_parameters():
            if known.get(parameter) != parameter.dtype and not is_finite(parameter):
                raise CorruptDonorError(f"organ {name!r}: non-finite values in layer {n} {key} as {parameter.dtype}")


def adopt(layer: nn.Module, config: PreTrainedConfig, reference: Mapping[str, nn.Module], training: bool) -> None:
    """Give a layer that enters a stack the config, train mode and gradient checkpointing of its neighbours.

    Args:
        layer: The layer.
        config: The recipient's.
        reference: A layer that is in the stack already, as modules by name.
        training: Whether the recipient is in train mode.
    """
    layer.train(training)
    for module in layer.modules():
        if isinstance(vars(module).get("config"), PreTrainedConfig):
            vars(module)["config"] = config
    copy_checkpointing(layer, reference)


def configs_of(model: nn.Module) -> Iterator[tuple[nn.Module, str, PreTrainedConfig]]:
    """Yield the native configs that modules of a model hold: the module, the attribute and the config."""
    for module in model.modules():
        yield from ((module, key, value) for key, value in vars(module).items() if isinstance(value, PreTrainedConfig))


def own_configs(model: nn.Module) -> None:
    """Give a model copies of its configs: the objects may be those of other models too."""
    memo: dict[int, Any] = {}  # what several modules share is copied once
    for module, key, config in list(configs_of(model)):
        vars(module)[key] = copy.deepcopy(config, memo)


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
