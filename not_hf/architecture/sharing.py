"""Layers that attend to the keys and values of others, as the last ones of Gemma 3n and some of Gemma 4 do."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedConfig

from not_hf.architecture.tables import SHARING, SHARING_SUFFIX
from not_hf.errors import UnsupportedArchitectureError

LayerOrigin = tuple[PreTrainedConfig, int]  # the config of a layer's own model, and its index there


def first_sharing(config: PreTrainedConfig) -> int:
    """The index of the first layer that attends to keys and values of another; the number of layers if none does."""
    return int(config.num_hidden_layers) - (getattr(config, SHARING_SUFFIX, None) or 0)


def source_of(config: PreTrainedConfig, i: int) -> int:
    """The index of the layer to whose keys and values layer `i` attends: its own, or that of another."""
    if i < (first := first_sharing(config)):
        return i
    return max((n for n in range(first) if config.layer_types[n] == config.layer_types[i]), default=-1)


def require_known_sharing(config: PreTrainedConfig, layers: Sequence[nn.Module]) -> None:
    """Check that those layers share that are expected to by their config.

    Raises:
        UnsupportedArchitectureError: Others do.
    """
    shares = [any(getattr(module, SHARING, False) for module in layer.modules()) for layer in layers]
    if shares != [n >= first_sharing(config) for n in range(len(layers))]:
        raise UnsupportedArchitectureError(
            f"model_type {config.model_type!r} shares keys and values between layers in an unknown way"
        )


def spliced_suffix(base: PreTrainedConfig, origins: Sequence[LayerOrigin]) -> int:
    """The number of layers at the end of a stack that share, if each attends to what it did in its own model.

    Raises:
        UnsupportedArchitectureError: One would not.
    """
    kind = f"model_type {base.model_type!r}"
    shares = [i >= first_sharing(config) for config, i in origins]
    first = shares.index(True) if True in shares else len(shares)
    if not all(shares[first:]):
        raise UnsupportedArchitectureError(
            f"{kind} has layers at its end that take keys and values of others ({SHARING_SUFFIX}); no layer that has "
            "its own can stand behind them"
        )
    types = [config.layer_types[i] for config, i in origins] if any(shares) else []
    for n in range(first, len(origins)):
        found = max((m for m in range(first) if types[m] == types[n]), default=None)
        if found is None or not _stands_for_source(origins, n, found):
            config, i = origins[n]
            instead = "which is not among these layers" if found is None else "and would take those of another"
            raise UnsupportedArchitectureError(
                f"{kind} shares keys and values between layers ({SHARING_SUFFIX}): layer {i} takes those of layer "
                f"{source_of(config, i)}, {instead}"
            )
    return len(origins) - first


def _stands_for_source(origins: Sequence[LayerOrigin], n: int, found: int) -> bool:
    """Whether the layer at `found` is the source of the one at `n`, or has replaced it.

    It has replaced it if it stands where the source did among its neighbours, with nothing inserted between them.
    """
    config, i = origins[n]
    if origins[found][0] is config:
        return origins[found][1] == source_of(config, i)
    before = max((m for m in range(found) if origins[m][0] is config), default=-1)
    behind = min(m for m in range(found, n + 1) if origins[m][0] is config)
    start = -1 if before < 0 else origins[before][1]
    return origins[behind][1] - start == behind - before and found - before == source_of(config, i) - start
