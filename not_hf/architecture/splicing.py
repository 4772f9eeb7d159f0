"""Splicing: how the config, and the indices that layers store, change when layers move."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from not_hf.architecture.releases import overridden_keys, values_of_layer
from not_hf.architecture.sharing import LayerOrigin, spliced_suffix
from not_hf.architecture.tables import (
    COUNT_ATTRIBUTES,
    COUNTED_BY_FIRST_LAYER,
    DENSE_PREFIXES,
    FEATURE_LAYERS,
    FEATURES_OF_FIRST_LAYERS,
    INDEX_ATTRIBUTES,
    LAYER_INDEX_LISTS,
    NUMBERED_FROM_ONE,
    OVERRIDES,
    PER_LAYER_LISTS,
    PERIODS_WITH_OFFSET,
    PLACE_ATTRIBUTES,
    PLACE_BOUND,
    SHARING_SUFFIX,
    UNCOUNTED_TYPES,
)
from not_hf.errors import UnsupportedArchitectureError


def splice_config(base: PreTrainedConfig, origins: Sequence[LayerOrigin]) -> dict[str, Any]:
    """The config values that change when a model of config `base` gets the layers `origins`, in order.

    Args:
        base: Config of the model that receives the layers; it is not changed.
        origins: For each layer of the new stack, where it comes from.

    Returns:
        New values by attribute name, for `num_hidden_layers` and every per-layer rule that `base` has.

    Raises:
        UnsupportedArchitectureError: A rule of the architecture cannot describe these layers in this order.
    """
    values: dict[str, Any] = {"num_hidden_layers": len(origins)}
    derived = [key for key in PER_LAYER_LISTS if _is_list(base, key) and _is_derived(base, key)]
    for key in PER_LAYER_LISTS:
        if _is_list(base, key) and len(getattr(base, key)) == base.num_hidden_layers and key not in derived:
            values[key] = [getattr(config, key)[i] for config, i in origins]
    for key in LAYER_INDEX_LISTS:
        if hasattr(base, key) and any(_is_list(config, key) for config in (base, *(config for config, _ in origins))):
            values[key] = [n for n, (config, i) in enumerate(origins) if i in (getattr(config, key) or ())]
    if "attention_layers" in values and _is_list(base, "attention_types"):  # gpt_neo writes the list run-length coded
        values["attention_types"] = [[list(values["attention_layers"]), 1]]
    if getattr(base, "decoder_sparse_step", None) is not None and "mlp_only_layers" in values:
        # layer i is sparse if step divides i + 1, unless it is listed: the same with step 1 and the list alone
        values["mlp_only_layers"] = [
            n
            for n, (config, i) in enumerate(origins)
            if (i + 1) % (config.decoder_sparse_step or 1) or i in config.mlp_only_layers
        ]
        values["decoder_sparse_step"] = 1
    for key in DENSE_PREFIXES:
        if getattr(base, key, None) is not None:
            dense = [i < getattr(config, key) for config, i in origins]
            values[key] = dense.index(False) if False in dense else len(dense)
    for key, lists in NUMBERED_FROM_ONE.items():
        if isinstance(old := getattr(base, key, None), dict):
            values[key] = old | {
                name: [n + 1 for n, (config, i) in enumerate(origins) if i + 1 in getattr(config, key)[name]]
                for name in old.keys() & {*lists}
            }
    if getattr(base, SHARING_SUFFIX, None) is not None:
        values[SHARING_SUFFIX] = spliced_suffix(base, origins)
    own = {key for config in (base, *(config for config, _ in origins)) for key in overridden_keys(config) or ()}
    if own:
        values[OVERRIDES] = _overrides(own, origins)  # after the number of layers, by which it is checked
    for keys in PERIODS_WITH_OFFSET:
        if all(hasattr(base, key) for key in keys):
            values.update(zip(keys, _spliced_period(base, keys, origins), strict=True))
    if derived:
        _require_derived(base, values, {key: [getattr(config, key)[i] for config, i in origins] for key in derived})
    return values


def own_values(base: PreTrainedConfig, keys: Iterable[str]) -> dict[str, Any]:
    """The values of a config for keys of `splice_config`: with them, a spliced config is as it was."""
    return {key: _own_overrides(base) if key == OVERRIDES else copy.deepcopy(getattr(base, key)) for key in keys}


def _own_overrides(base: PreTrainedConfig) -> dict[int, dict[str, Any]] | None:
    keys = overridden_keys(base)
    return None if keys is None else _overrides(keys, [(base, n) for n in range(base.num_hidden_layers)])


def _overrides(keys: Iterable[str], origins: Sequence[LayerOrigin]) -> dict[int, dict[str, Any]]:
    return {n: values_of_layer(config, i, sorted(keys)) for n, (config, i) in enumerate(origins)}


def _spliced_period(base: PreTrainedConfig, keys: tuple[str, str], origins: Sequence[LayerOrigin]) -> tuple[int, int]:
    """A period and offset that mark those of the layers that are marked in their own models; the base's if they can.

    Raises:
        UnsupportedArchitectureError: There is none.
    """

    def marks(config: PreTrainedConfig, i: int) -> bool:
        period, offset = (getattr(config, key) for key in keys)
        return bool(i % period == offset)

    marked = [marks(config, i) for config, i in origins]
    for period in (getattr(base, keys[0]), *range(1, len(marked) + 2)):
        for offset in range(period):
            if all((n % period == offset) == mark for n, mark in enumerate(marked)):
                return period, offset
    places = ", ".join(str(n) for n, mark in enumerate(marked) if mark)
    raise UnsupportedArchitectureError(
        f"model_type {base.model_type!r} spaces layers evenly ({', '.join(keys)}), "
        f"and these would stand at {places} of {len(marked)}"
    )


def _require_derived(base: PreTrainedConfig, values: dict[str, Any], expected: dict[str, list[Any]]) -> None:
    """Check that a config with these values derives these lists from them.

    Raises:
        UnsupportedArchitectureError: It derives others.
    """
    config = copy.copy(base)
    for key, value in values.items():
        setattr(config, key, value)
    for key, of_layers in expected.items():
        if (found := list(getattr(config, key))) != of_layers:
            raise UnsupportedArchitectureError(
                f"model_type {base.model_type!r} cannot have {key} {', '.join(map(str, of_layers))}: "
                f"its config makes them {', '.join(map(str, found))}"
            )


def spliced_config(base: PreTrainedConfig, origins: Sequence[LayerOrigin]) -> PreTrainedConfig:
    """A copy of `base` that describes the layers `origins`."""
    config = copy.deepcopy(base)
    for key, value in splice_config(base, origins).items():
        setattr(config, key, value)
    return config


def require_counted(base: PreTrainedConfig, spliced: PreTrainedConfig) -> None:
    """Check that each layer of a spliced model has its inputs, and that its cache counts tokens if the base's does.

    Raises:
        UnsupportedArchitectureError: The cache does not, or there are more or fewer layers than inputs for them.
    """
    if (key := place_bound(base)) and spliced.num_hidden_layers != base.num_hidden_layers:
        raise UnsupportedArchitectureError(
            f"model_type {base.model_type!r} has inputs for {base.num_hidden_layers} layers ({key}), "
            f"not for {spliced.num_hidden_layers}"
        )
    counted, still = (
        [kind not in UNCOUNTED_TYPES for kind in getattr(config, "layer_types", None) or ()]
        for config in (base, spliced)
    )
    if any(counted) and not any(still):
        raise UnsupportedArchitectureError(
            f"model_type {base.model_type!r} needs an attention layer in its stack, by which its cache counts tokens"
        )
    if base.model_type in COUNTED_BY_FIRST_LAYER and counted[0] and not still[0]:
        raise UnsupportedArchitectureError(
            f"model_type {base.model_type!r} needs an attention layer as its first, by which its cache counts tokens"
        )


def place_bound(config: PreTrainedConfig) -> str | None:
    """The config key that says that layers have inputs of their own beside hidden states; `None` if they do not."""
    return next((key for key in PLACE_BOUND if getattr(config, key, None)), None)


def moved_features(config: PreTrainedConfig, position: Any, mode: str) -> list[str]:
    """Say if a model of this whole config adds features of images elsewhere with an organ at a place than without."""
    lowest = _above_features(config) if mode == "insert" else 0
    if position >= lowest:
        return []
    return [
        "features of images are added by the index of the layer: an organ that is inserted below position "
        f"{lowest} moves them to other layers, whatever it computes; insert it there or above"
    ]


def _above_features(config: PreTrainedConfig) -> int:
    """The lowest position above the layers between which a model adds features of images; 0 if it does not."""
    inner = [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]
    counts = [len(getattr(config, key, None) or ()) for key in FEATURES_OF_FIRST_LAYERS]
    indices = [n for key in FEATURE_LAYERS for n in getattr(config, key, None) or ()]
    last = [n[-1] if isinstance(n, (list, tuple)) else n for n in indices]
    return max([0, *counts, *last, *map(_above_features, inner)])


def place_attributes(layer: nn.Module) -> dict[tuple[str, str], Any]:
    """Attributes in which a layer stores what is made of its place beside its index, by module name and attribute."""
    return {
        (name, key): vars(module)[key]
        for name, module in layer.named_modules()
        for key in PLACE_ATTRIBUTES
        if key in vars(module)
    }


def set_layer_index(
    layer: nn.Module, index: int, num_layers: int, of_place: Mapping[tuple[str, str], Any] = MappingProxyType({})
) -> None:
    """Set the index in the stack, and the number of layers, that a layer and the modules in it store.

    Args:
        layer: The layer.
        index: Its index.
        num_layers: The number of layers.
        of_place: `place_attributes` of a native layer there.
    """
    for (path, key), value in of_place.items():
        setattr(layer.get_submodule(path), key, value)
    values = dict.fromkeys(INDEX_ATTRIBUTES, index) | dict.fromkeys(COUNT_ATTRIBUTES, num_layers)
    for module in layer.modules():
        for name, value in values.items():
            if type(vars(module).get(name)) is int:  # None where a model does not number this module
                setattr(module, name, value)


def _is_list(config: PreTrainedConfig, key: str) -> bool:
    return key not in (overridden_keys(config) or ()) and isinstance(getattr(config, key, None), (list, tuple))


def _is_derived(config: PreTrainedConfig, key: str) -> bool:
    """Whether a config computes a value from others, and does not let it be set."""
    value = getattr(type(config), config.attribute_map.get(key, key), None)
    return isinstance(value, property) and value.fset is None
