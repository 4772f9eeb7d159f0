"""Master weights: a module that is trained in float32 and computes in the dtype of the model around it.

In bfloat16 most updates of a weight are smaller than the distance to the next number, and are lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Self

import torch
from torch import nn

from not_hf.architecture.computed_weights import ComputedWeights, compute_weights
from not_hf.architecture.upstream import parameters_in


class MasterWeights(ComputedWeights):
    """Mixed into the class of a layer: casts float32 parameters to the dtype of the hidden states in each forward."""

    attributes = ("not_cast", "computes_in")
    not_cast: frozenset[str]  # names of parameters that are float32 in the recipient too
    computes_in: torch.dtype  # dtype of the recipient's layers

    def computed(self, given: torch.Tensor) -> dict[str, torch.Tensor]:
        """Cast the parameters; for token ids, as embeddings take them, to the dtype of the recipient."""
        dtype = given.dtype if given.is_floating_point() else self.computes_in
        masters = {name: p for name, p in parameters_in(self) if p.dtype == torch.float32 != dtype}
        return {name: p.to(dtype) for name, p in masters.items() if name not in self.not_cast}

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """As in torch; a cast of the model changes what embeddings compute in, too."""
        super()._apply(fn, recurse)
        self.computes_in = fn(torch.empty(0, dtype=self.computes_in)).dtype
        return self


def hold_master_weights(module: nn.Module, not_cast: Iterable[str], computes_in: torch.dtype) -> None:
    """Have a module cast its other parameters in each forward."""
    compute_weights(module, MasterWeights, not_cast=frozenset(not_cast), computes_in=computes_in)
