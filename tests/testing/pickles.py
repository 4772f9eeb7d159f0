"""Layers as people saved them with torch.save, in every layout that is understood."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from not_hf.architecture.stack import find_stack
from testing.models import tiny_model

FIRST, LAST = SPAN = (1, 3)


Layers = list[dict[str, torch.Tensor]]


def trained(model_type: str) -> PreTrainedModel:
    """A model of the same config as the base, and other weights."""
    return tiny_model(model_type, seed=1)


def layers_of(model_type: str) -> Layers:
    """State dicts of the trained layers, as PyTorch gives them."""
    return [dict(layer.state_dict()) for layer in find_stack(trained(model_type)).layers[FIRST:LAST]]


def flat(layers: Layers, prefix: str, first: int = 0) -> dict[str, torch.Tensor]:
    """One dict of all, their numbers in the names."""
    return {f"{prefix}{first + n}.{key}": tensor for n, layer in enumerate(layers) for key, tensor in layer.items()}


def whole(model_type: str) -> dict[str, torch.Tensor]:
    """A whole model without its other layers."""
    model = trained(model_type)
    path = find_stack(model).full_path
    rest = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith(f"{path}.")}
    return rest | flat(layers_of(model_type), f"{path}.", FIRST)


ABSOLUTE: dict[str, Callable[[Layers], Any]] = {  # layouts that number layers as the base does
    "dict by number": lambda layers: {FIRST + n: layer for n, layer in enumerate(layers)},
    "dict by text": lambda layers: {str(FIRST + n): OrderedDict(layer) for n, layer in enumerate(layers)},
    "dict by name and number": lambda layers: {f"layer_{FIRST + n}": layer for n, layer in enumerate(layers)},
    "flat, transformer.h": lambda layers: flat(layers, "transformer.h.", FIRST),
    "flat, any prefix": lambda layers: flat(layers, "my.own.stack_2.", FIRST),
    "flat, no prefix": lambda layers: flat(layers, "", FIRST),
    "compiled, in parallel": lambda layers: flat(layers, "module._orig_mod.model.layers.", FIRST),
    "each one compiled": lambda layers: {
        f"layers.{FIRST + n}._orig_mod.{key}": tensor
        for n, layer in enumerate(layers)
        for key, tensor in layer.items()
    },
    "each one with its facts": lambda layers: {
        "donor_layers": {FIRST + n: {"loss": 0.5, "weights": layer} for n, layer in enumerate(layers)}
    },
}


RELATIVE: dict[str, Callable[[Layers], Any]] = {  # that number them from 0, or not at all
    "list": lambda layers: layers,
    "tuple": tuple,
    "dict from 0": lambda layers: dict(enumerate(layers)),
    "flat, layers": lambda layers: flat(layers, "layers."),
    "flat, h": lambda layers: flat(layers, "h."),
    "flat, from 0": lambda layers: flat(layers, ""),
    "nested": lambda layers: {"a": [{"b": ({"state_dict": {"donor_layers": layers}}, None)}]},
    "beside other things": lambda layers: {
        "config": {"n_layer": 4, "layers": [1, 2], "name": "gpt2"},
        "epoch": 3,
        "optimizer": {
            "state": {n: {"step": torch.tensor(1.0), "exp_avg": torch.ones(3)} for n in range(4)},
            "param_groups": [{"lr": 1e-3, "params": [0, 1, 2, 3]}],
        },
        "model_state_dict": flat(layers, "h."),
        "embeddings": torch.ones(96, 32),
        "losses": [0.5, 0.25],
    },
    "with a norm of a layer's name outside": lambda layers: {
        "layers": layers,
        "final_layer_norm.weight": torch.ones(32),
        next(key for key in layers[0] if "norm" in key or "ln_" in key): torch.ones(32),
    },
}


FROM_MODEL: dict[str, Callable[[str], Any]] = {
    "module list": lambda model_type: find_stack(trained(model_type)).layers[FIRST:LAST].state_dict(),
    "whole model": whole,
}


def save(content: object, folder: Path, **options) -> Path:
    """Write the file that the paper's author has in each folder."""
    file = folder / "donor_layers.pt"
    torch.save(content, file, **options)
    return file
