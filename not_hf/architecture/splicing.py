"""Splicing: how the config, and the indices that layers store, change when layers move."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from not_hf.architecture.tables import DENSE_PREFIXES, INDEX_ATTRIBUTES, LAYER_INDEX_LISTS, PER_LAYER_LISTS

LayerOrigin = tuple[PreTrainedConfig, int]  # the config of a layer's own model, and its index there


def splice_config(base: PreTrainedConfig, origins: Sequence[LayerOrigin]) -> dict[str, Any]:
    """The config values that change when a model of config `base` gets the layers `origins`, in order.

    Args:
        base: Config of the model that receives the layers; it is not changed.
        origins: For each layer of the new stack, where it comes from.

    Returns:
        New values by attribute name, for `num_hidden_layers` and every per-layer rule that `base` has.
    """
    values: dict[str, Any] = {"num_hidden_layers": len(origins)}
    for key in PER_LAYER_LISTS:
        if _is_list(base, key) and len(getattr(base, key)) == base.num_hidden_layers:
            values[key] = [getattr(config, key)[i] for config, i in origins]
    for key in LAYER_INDEX_LISTS:
        if _is_list(base, key):
            values[key] = [n for n, (config, i) in enumerate(origins) if i in getattr(config, key)]
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
    return values


def spliced_config(base: PreTrainedConfig, origins: Sequence[LayerOrigin]) -> PreTrainedConfig:
    """A copy of `base` that describes the layers `origins`."""
    config = copy.deepcopy(base)
    for key, value in splice_config(base, origins).items():
        setattr(config, key, value)
    return config


def set_layer_index(layer: nn.Module, index: int) -> None:
    """Set the index in the stack that a layer and the modules in it store."""
    for module, name in _index_holders(layer):
        setattr(module, name, index)


def _index_holders(layer: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    for module in layer.modules():
        for name in INDEX_ATTRIBUTES:
            if type(vars(module).get(name)) is int:  # None where a model does not number this module
                yield module, name


def _is_list(config: PreTrainedConfig, key: str) -> bool:
    return isinstance(getattr(config, key, None), (list, tuple))
