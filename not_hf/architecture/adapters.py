"""PEFT's adapters in a model: whether there are any, and which of them act."""

from __future__ import annotations

from typing import Any

from torch import nn

from not_hf.errors import NotHFError


def has_adapters(model: nn.Module) -> bool:
    """Whether a model has layers of PEFT."""
    return any(type(module).__module__.startswith("peft.") for module in model.modules())


def stored_adapter(base: str) -> NotHFError:
    """Return the error for a base whose folder or repo holds an adapter beside the model."""
    return NotHFError(f"{base} holds an adapter (LoRA); merge it, save the merged model, and name that")


def is_adapted(module: nn.Module) -> bool:
    """Whether PEFT has put adapters on a module; a model has a method of that name."""
    return isinstance(getattr(type(module), "active_adapter", None), property)


def adapter_state(module: Any) -> str:
    """Which adapters of a module act, and how much."""
    keys = ("disable_adapters", "active_adapter", "merged_adapters", "scaling")
    return repr([getattr(module, key, None) for key in keys])
