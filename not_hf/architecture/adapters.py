"""PEFT's adapters in a model: whether there are any, and which of them act."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from not_hf.errors import NotHFError


def has_adapters(model: nn.Module) -> bool:
    """Whether a model has layers of PEFT."""
    return any(type(module).__module__.startswith("peft.") for module in model.modules())


def stored_adapter(base: str) -> NotHFError:
    """Return the error for a base whose folder or repo holds an adapter beside the model."""
    return NotHFError(f"{base} holds an adapter (LoRA); merge it, save the merged model, and name that")


def own_parameters(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Parameter]]:
    """Yield a module's parameters as if PEFT had put nothing around its parts: by their names then, and no others."""
    for key in ("base_layer", "original_module"):
        while isinstance(inner := getattr(module, key, None), nn.Module):
            module = inner
    yield from ((prefix + name, parameter) for name, parameter in module.named_parameters(recurse=False))
    for name, child in module.named_children():
        yield from own_parameters(child, f"{prefix}{name}.")


def is_adapted(module: nn.Module) -> bool:
    """Whether PEFT has put adapters on a module; a model has a method of that name."""
    return isinstance(getattr(type(module), "active_adapter", None), property)


def adapter_state(module: Any) -> str:
    """Which adapters of a module act, and how much."""
    keys = ("disable_adapters", "active_adapter", "merged_adapters", "scaling")
    return repr([getattr(module, key, None) for key in keys])
