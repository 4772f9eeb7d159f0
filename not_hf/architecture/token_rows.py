"""Token rows: some rows of an embedding or head that are trained while the others stay frozen."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from not_hf.architecture.computed_weights import ComputedWeights, compute_weights


class TokenRows(ComputedWeights):
    """Mixed into the class of an embedding or head: puts its rows into the frozen weight in each forward, as PEFT."""

    attributes = ("token_indices", "token_rows")
    weight: torch.Tensor  # (vocab, hidden)
    token_indices: torch.Tensor  # (rows,)
    token_rows: nn.Parameter  # (rows, hidden)

    def computed(self, given: torch.Tensor) -> dict[str, torch.Tensor]:
        """Put the rows into the weight."""
        return {"weight": self.weight.index_copy(0, self.token_indices, self.token_rows.to(self.weight.dtype))}


def hold_token_rows(modules: Sequence[nn.Module], indices: Sequence[int], rows: nn.Parameter) -> None:
    """Have modules that share their weight, `(vocab, hidden)`, put these rows, `(rows, hidden)`, into it."""
    for module in modules:
        module.register_buffer("token_indices", torch.tensor(indices, device=rows.device), persistent=False)
        module.register_parameter("token_rows", rows)
        compute_weights(module, TokenRows)
