"""How configs and layers differ: the basis of the guard before a merge and of every check of an organ."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedConfig

from not_hf.architecture import tables
from not_hf.architecture.computed_weights import native_class
from not_hf.architecture.layers import is_dropout
from not_hf.architecture.stack import Stack
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
    """The keys in which two configs differ, other than names, dtypes and private ones."""
    mine, other = ours.to_dict(), theirs.to_dict()
    keys = sorted(key for key in (mine.keys() | other.keys()) - tables.NAMES if not key.startswith("_"))
    pairs = [Difference(key, mine.get(key), other.get(key)) for key in keys]
    return [pair for pair in pairs if not _same(pair.ours, pair.theirs)]


def computing_differences(ours: PreTrainedConfig, theirs: PreTrainedConfig) -> list[Difference]:
    """The differences of two configs that may change what layers compute: some layers read the recipient's config."""
    ignored = {
        "num_hidden_layers",
        *(key for key in tables.PER_LAYER_LISTS if not isinstance(vars(ours).get(key), int)),
        *tables.LAYER_INDEX_LISTS,
        *tables.DENSE_PREFIXES,
        *tables.PERIODS,
        *(key for keys in tables.PERIODS_WITH_OFFSET for key in keys),
        *tables.LAYERLESS,
        *(tables.OVERRIDES, tables.SHARING_SUFFIX),
    }
    ignored |= {ours.attribute_map.get(key, key) for key in ignored}
    return [
        difference
        for difference in config_differences(ours, theirs)
        if difference.key not in ignored
        and not any(name in difference.key for name in ("dropout", "pdrop"))  # for training only
        and not difference.key.endswith("_token_id")
    ]


class LayerDescription(NamedTuple):
    """What a layer is built of. Two layers of equal descriptions and values compute the same."""

    parameters: dict[str, tuple[int, ...]]  # shapes by name
    buffers: dict[str, tuple[int, ...]]
    modules: dict[str, type]  # classes by name
    attributes: dict[tuple[str, str], Any]  # plain ones that a class derives from its config, by module and name


def describe(layer: nn.Module) -> LayerDescription:
    """Describe a layer."""
    modules = dict(layer.named_modules())
    return LayerDescription(
        {name: tuple(tensor.shape) for name, tensor in layer.named_parameters()},
        {name: tuple(tensor.shape) for name, tensor in layer.named_buffers()},
        {name: type(module) for name, module in modules.items()} | {"": native_class(layer)},
        {
            (name, key): value
            for name, module in modules.items()
            for key, value in _derived(module).items()
            if key not in tables.COUNT_ATTRIBUTES  # set on every splice
        },
    )


def outer_attributes(stack: Stack) -> dict[tuple[str, str], Any]:
    """Plain attributes, and lists of such, of the modules outside a stack, by module name and attribute.

    A native `__init__` derives some from the per-layer config (`has_sliding_layers`), so they change when layers do.
    """
    outside = stack.model.named_modules(memo={stack.layers})  # what is in the memo is passed over
    found = ((name, _derived(module, or_lists=True)) for name, module in outside)
    return {(name, key): value for name, attributes in found for key, value in attributes.items()}


def native_differences(
    layers: Sequence[LayerDescription], natives: Sequence[LayerDescription], there: str = "natively"
) -> list[str]:
    """In what layers differ from those a native model of the same config would have.

    An empty list means: saved with this config and loaded without not_hf, these layers compute the same.

    Args:
        layers: Of a stack with organs.
        natives: Of the native model, or others to compare with.
        there: Where the others are, in words.
    """
    return [
        f"layer {n}{difference}"
        for n, (layer, native) in enumerate(zip(layers, natives, strict=True))
        if layer != native
        for difference in _layer_differences(layer, native, there)
    ]


def _layer_differences(ours: LayerDescription, theirs: LayerDescription, there: str) -> Iterator[str]:
    """In what one layer differs from another; each reads on after the layer's name."""
    mine, native = ours.parameters | ours.buffers, theirs.parameters | theirs.buffers
    for name in sorted(mine.keys() | native.keys()):
        if mine.get(name) != native.get(name):
            yield f" {name} has shape {mine.get(name)}, {there} {native.get(name)}"
    for name in sorted(ours.modules.keys() & theirs.modules.keys()):
        if ours.modules[name] is not theirs.modules[name]:
            yield f"{_below(name)} is {ours.modules[name].__name__}, {there} {theirs.modules[name].__name__}"
    for name, key in sorted(ours.attributes.keys() & theirs.attributes.keys()):
        if not _same(value := ours.attributes[name, key], other := theirs.attributes[name, key]):
            yield f"{_below(name)}.{key} is {value!r}, {there} {other!r}"


def _below(name: str) -> str:
    return f" {name}" if name else ""


def same_modules(layers: Iterable[LayerDescription], others: Iterable[LayerDescription]) -> bool:
    """Whether layers are built of modules of the same classes and shapes."""
    return all(ours[:3] == theirs[:3] for ours, theirs in zip(layers, others, strict=True))


def inherit_attributes(layers: Sequence[nn.Module], originals: Sequence[LayerDescription]) -> None:
    """Give layers the plain attributes that their originals have because of where they stand in the base.

    Args:
        layers: Layers of an organ, built as the first ones of a shorter model.
        originals: The same layers of the base.

    Raises:
        UnsupportedArchitectureError: At their new position they have other modules or shapes.
    """
    for layer, original in zip(layers, originals, strict=True):
        description = describe(layer)
        if not same_modules([description], [original]):
            raise UnsupportedArchitectureError(
                "these layers have other modules or shapes at another position; cut a span that does not depend on it"
            )
        for (name, key), value in original.attributes.items():
            if description.attributes.get((name, key), value) != value:
                setattr(layer.get_submodule(name), key, value)


def fingerprint(config: PreTrainedConfig) -> str:
    """SHA-256 of the config keys that concern layers: equal for two fine-tunes of one model."""
    ignored = tables.NAMES | {
        "vocab_size",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "use_cache",
        "tie_word_embeddings",
    }
    values = {key: value for key, value in config.to_dict().items() if key not in ignored}
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def _derived(module: nn.Module, or_lists: bool = False) -> dict[str, Any]:
    """The plain attributes that a module's class derives from the config, but for the layer's index."""
    attributes = vars(module)
    return {
        key: value
        for key in attributes.keys() - tables.NOT_DERIVED
        if _is_plain(value := attributes[key]) or (or_lists and isinstance(value, list) and all(map(_is_plain, value)))
        if not is_dropout(module, key) and not key.startswith(BOOKKEEPING)
    }


def _is_plain(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str, tuple, type(None)))


def _same(ours: Any, theirs: Any) -> bool:
    """Whether two values are equal; floats in the precision of float32, in which GGUF files store them."""
    if isinstance(ours, float) and isinstance(theirs, float):
        return math.isclose(ours, theirs, rel_tol=2**-24)
    return bool(ours == theirs)
