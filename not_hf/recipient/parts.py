"""Organs that hold parts of layers: copies of the recipient's layers, with the donor's parts in them."""

from __future__ import annotations

import copy
from typing import Any

from accelerate.hooks import remove_hook_from_module
from torch import nn

from not_hf.architecture.parts import held_parameters, set_parameter
from not_hf.donor.modeling import DonorModel
from not_hf.errors import IncompatibleDonorError, NotHFError, some
from not_hf.recipient.surgery import Surgery


def layers_with_parts(
    surgery: Surgery, position: int, donor: DonorModel, is_callers: bool
) -> tuple[list[nn.Module], frozenset[str]]:
    """Copy the recipient's layers from a position on, with a donor's parts in them; they share all other parameters.

    Args:
        surgery: Of the recipient.
        position: Of the first layer.
        donor: Holds parts of layers.
        is_callers: Whether the donor's modules are to be copied.

    Returns:
        The layers, and the names of the tensors that are the recipient's, as `Organ.kept`.

    Raises:
        IncompatibleDonorError: The recipient's layers have other parts or shapes.
        NotHFError: The recipient is a scaffold or offloaded.
    """
    if surgery.is_scaffold:
        raise NotHFError('parts of layers need the recipient\'s own layers, which scaffold="minimal" leaves out')
    originals = surgery.base_layers[position : position + donor.config.num_organ_layers]
    sources = [copy.deepcopy(layer) for layer in donor.stack.layers] if is_callers else list(donor.stack.layers)
    layers: list[nn.Module] = []
    kept: set[str] = set()
    held = held_parameters(originals, donor.config.modules)
    for n, (original, source, names) in enumerate(zip(originals, sources, held, strict=True)):
        parts = dict(source.named_parameters())
        if unmatched := sorted(set(names) ^ parts.keys()):
            raise IncompatibleDonorError(
                f"layers of the recipient have other modules than the donor's ({some(unmatched)})"
            )
        layer = _with_parts(original, source, parts)
        layers.append(layer)
        kept |= {f"{n}.{name}" for name in layer.state_dict() if name not in parts}
    return layers, frozenset(kept)


def _with_parts(original: nn.Module, source: nn.Module, parts: dict[str, nn.Parameter]) -> nn.Module:
    """Copy a layer with parameters of another one, by name, in it."""
    parameters = dict(original.named_parameters())
    if any(each.is_meta for each in parameters.values()) and not any(each.is_meta for each in parts.values()):
        raise NotHFError("the recipient's layers are offloaded; parts of layers need a recipient in memory")
    memo: dict[int, Any] = {id(each): each for name, each in parameters.items() if name not in parts}
    layer = copy.deepcopy(original, memo)
    remove_hook_from_module(layer, recurse=True)
    for path, module in list(layer.named_modules()):
        own = [f"{path}.{key}" if path else key for key, _ in module.named_parameters(recurse=False)]
        if own and set(own) <= parts.keys() and next(module.children(), None) is None:
            layer.set_submodule(path, source.get_submodule(path))  # the recipient's may be quantized
            continue
        for name in (name for name in own if name in parts):
            set_parameter(layer, name, parts[name])
    return layer
