"""Notices that the recipient's own layers were changed, which is not saved with organs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor

_NUM_VALUES = 8  # of each parameter; an adapter that is merged changes them all


class OwnWeights:
    """The first values of each parameter of the recipient's layers, as they were when it got its first organ."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._before = {key: values.clone() for key, values in _first_values(layers)}

    def convert(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Follow a change of dtype or device, which `fn` makes."""
        self._before = {key: fn(values) for key, values in self._before.items()}

    def have_changed(self, layers: Sequence[nn.Module]) -> bool:
        """Whether a parameter has other values now, beyond rounding; wrapped and sharded ones are passed over."""
        return any(
            key in self._before and not torch.allclose(values, self._before[key].to(values))
            for key, values in _first_values(layers)
        )


def _first_values(layers: Sequence[nn.Module]) -> Iterator[tuple[tuple[str, torch.Size], torch.Tensor]]:
    """Yield the first values of parameters that are neither packed nor elsewhere, by their names and shapes."""
    for name, parameter in nn.ModuleList(layers).named_parameters():
        if parameter.is_floating_point() and not (parameter.is_meta or isinstance(parameter.data, DTensor)):
            yield (name, parameter.shape), parameter.detach().flatten()[:_NUM_VALUES]
