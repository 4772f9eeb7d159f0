"""How configs and layers differ: the basis of the guard before a merge and of every check of an organ."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from not_hf.architecture.tables import (
    DENSE_PREFIXES,
    INDEX_ATTRIBUTES,
    LAYER_INDEX_LISTS,
    LAYERLESS,
    NAMES,
    NOT_DERIVED,
    PER_LAYER_LISTS,
    PERIODS,
)
from not_hf.architecture.upstream import BOOKKEEPING
from not_hf.errors import UnsupportedArchitectureError


class Difference(NamedTuple):
    """A config key that has two values."""

    key: str
    ours: Any
    theirs: Any

    def __str__(self) -> str:
        return f"{self.key} is {self.ours!r}, not {self.theirs!r}"


def config_differences(ours: PreTrainedConfig, theirs: PreTrainedConfig) -> list[Difference]:
    """The keys in which two configs differ, other than names and dtypes."""
    mine, other = ours.to_dict(), theirs.to_dict()
    keys = sorted((mine.keys() | other.keys()) - NAMES)
    pairs = [Difference(key, mine.get(key), other.get(key)) for key in keys]
    return [pair for pair in pairs if not _same(pair.ours, pair.theirs)]


def computing_differences(ours: PreTrainedConfig, theirs: PreTrainedConfig) -> list[Difference]:
    """The differences of two configs that may change what layers compute: some layers read the recipient's config."""
    ignored = {"num_hidden_layers", *PER_LAYER_LISTS, *LAYER_INDEX_LISTS, *DENSE_PREFIXES, *PERIODS, *LAYERLESS}
    ignored |= {ours.attribute_map.get(key, key) for key in ignored}
    return [
        difference
        for difference in config_differences(ours, theirs)
        if difference.key not in ignored
        and "dropout" not in difference.key
        and not difference.key.endswith("_token_id")
    ]


def outer_attributes(model: PreTrainedModel, stack_path: str) -> dict[tuple[str, str], Any]:
    """Plain attributes of the modules outside the stack (`has_sliding_layers`), by module name and attribute.

    A native `__init__` derives some of them from the per-layer config, so they change when layers do.
    """
    return {
        (name, key): value
        for name, module in model.named_modules()
        if not f"{name}.".startswith(f"{stack_path}.")
        for key, value in _scalars(module).items()
    }


def native_differences(
    layers: Sequence[nn.Module],
    twin_layers: Sequence[nn.Module],
    own: Sequence[Collection[str]] | None = None,
    there: str = "natively",
) -> list[str]:
    """How live layers differ from those of a native model of the same config.

    An empty list means: saved with this config and loaded without not_hf, these layers compute the same.

    Args:
        layers: The live layers.
        twin_layers: The native layers, or others to compare with.
        own: For each layer, differences to ignore, since it has them at any position (a quantizer's modules).
        there: Where the twins are, for the messages.
    """
    return [
        f"layer {n}{difference}"
        for n, (layer, twin) in enumerate(zip(layers, twin_layers, strict=True))
        for difference in layer_differences(layer, twin, there)
        if own is None or difference not in own[n]
    ]


def layer_differences(layer: nn.Module, twin: nn.Module, there: str = "natively") -> list[str]:
    """How a layer differs from a native one; each text continues the layer's name."""
    differences: list[str] = []
    ours, theirs = dict(layer.named_modules()), dict(twin.named_modules())
    if shape_of(layer) != shape_of(twin):
        differences += _tensor_differences("", shape_of(layer), shape_of(twin), there)
    for name in ours.keys() & theirs.keys():
        mine, native = _scalars(ours[name]), _scalars(theirs[name])
        where = f" {name}".rstrip()
        if type(ours[name]) is not type(theirs[name]):
            differences.append(f"{where} is {type(ours[name]).__name__}, {there} {type(theirs[name]).__name__}")
        differences += [
            f"{where}.{key} is {mine[key]!r}, {there} {native[key]!r}"
            for key in sorted(mine.keys() & native.keys())
            if not _same(mine[key], native[key])
        ]
    return differences


def same_modules(layers: Iterable[nn.Module], others: Iterable[nn.Module]) -> bool:
    """Whether layers are built of modules of the same classes and shapes."""
    return all(
        {name: type(module) for name, module in layer.named_modules()}
        == {name: type(module) for name, module in other.named_modules()}
        and shape_of(layer) == shape_of(other)
        for layer, other in zip(layers, others, strict=True)
    )


def inherit_attributes(layers: Sequence[nn.Module], originals: Sequence[nn.Module]) -> None:
    """Give layers the plain attributes that their originals have because of their position in the base.

    Args:
        layers: Layers of an organ, built as the first ones of a shorter model.
        originals: The same layers of the base, on the meta device.

    Raises:
        UnsupportedArchitectureError: At their new position they have other modules or shapes.
    """
    for layer, original in zip(layers, originals, strict=True):
        ours, theirs = dict(layer.named_modules()), dict(original.named_modules())
        if not same_modules([layer], [original]):
            raise UnsupportedArchitectureError(
                "these layers have other modules or shapes at another position; cut a span that does not depend on it"
            )
        for name, module in theirs.items():
            mine = _scalars(ours[name])
            for key, value in _scalars(module).items():
                if key not in INDEX_ATTRIBUTES and key in mine and mine[key] != value:
                    setattr(ours[name], key, value)


def shape_of(layer: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of each parameter and buffer below `layer`."""
    return {name: tuple(tensor.shape) for name, tensor in (*layer.named_parameters(), *layer.named_buffers())}


def fingerprint(config: PreTrainedConfig) -> str:
    """SHA-256 of the config keys that concern layers: equal for two fine-tunes of one model."""
    ignored = NAMES | {
        "vocab_size",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "use_cache",
        "tie_word_embeddings",
    }
    values = {key: value for key, value in config.to_dict().items() if key not in ignored}
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def _scalars(module: nn.Module) -> dict[str, Any]:
    return {
        key: value
        for key, value in vars(module).items()
        if key not in NOT_DERIVED
        and isinstance(value, (bool, int, float, str, tuple, type(None)))
        and "dropout" not in key
        and not (key == "p" and isinstance(module, nn.Dropout))  # for training only
        and not key.startswith(BOOKKEEPING)
    }


def _tensor_differences(where: str, ours: dict[str, Any], theirs: dict[str, Any], there: str) -> list[str]:
    return [
        f"{where} {name} has shape {ours.get(name)}, {there} {theirs.get(name)}"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]


def _same(ours: Any, theirs: Any) -> bool:
    """Whether two values are equal; floats in the precision of float32, in which GGUF files store them."""
    if isinstance(ours, float) and isinstance(theirs, float):
        return math.isclose(ours, theirs, rel_tol=2**-24)
    return bool(ours == theirs)
