"""One tensor of a merge without values: where its values are, and what becomes of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from not_hf.architecture.layers import is_finite
from not_hf.architecture.scaling import scaled
from not_hf.donor.delta import FileTensor
from not_hf.errors import NotHFError
from not_hf.hub.checkpoint import View

Replaced = tuple[str, torch.dtype]  # a tensor's name in the recipient's files, and its dtype in the recipient


@dataclass(frozen=True)
class OrganTensor:
    """A tensor in a donor's files, and what becomes of it in a recipient."""

    overflow: str  # what is said of a value that is not finite at the scale
    view: FileTensor
    loaded: torch.dtype  # of the donor
    dtype: torch.dtype  # in the recipient
    scale: float = 1.0
    replaced: Replaced | None = None  # what a scaled one moves away from

    def values(self, views: Mapping[str, View] = MappingProxyType({})) -> Iterator[torch.Tensor]:
        """Read the values as they are in the recipient, whose tensors these `views` are, in parts.

        Raises:
            NotHFError: A value is not finite at the organ's scale.
        """
        parts = (part.to(self.loaded).to(self.dtype) for part in self.view.chunks())
        if self.scale == 1:
            yield from parts
            return
        pairs: Iterator[tuple[torch.Tensor, torch.Tensor | None]] = ((part, None) for part in parts)
        if self.replaced is not None:
            name, dtype = self.replaced
            pairs = _side_by_side(parts, (part.to(dtype) for part in views[name].chunks()))
        for part, other in pairs:
            value = scaled(part, self.scale, other)
            if not is_finite(value):
                raise NotHFError(f"{self.overflow}; use a smaller scale")
            yield value


def name_in_recipient(source: OrganTensor | str) -> str | None:
    """Return the name of the tensor in the recipient's files that a source of values needs, if any."""
    if isinstance(source, str):
        return source
    return source.replaced[0] if source.replaced else None


def _side_by_side(
    ours: Iterable[torch.Tensor], theirs: Iterator[torch.Tensor]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield parts of equal length of two flat tensors that come in parts of any length."""
    other = torch.empty(0)
    for part in ours:
        while len(part):
            other = other if len(other) else next(theirs)
            length = min(len(part), len(other))
            yield part[:length], other[:length]
            part, other = part[length:], other[length:]
