"""Names and places of organs, and the stack that they form with a recipient's layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from not_hf.errors import IncompatibleDonorError, NotHFError


class Place(NamedTuple):
    """The place of an organ in a recipient."""

    name: str
    position: int  # among the recipient's own layers
    mode: str  # "insert" or "replace"
    num_layers: int  # of the organ

    @property
    def replaced(self) -> range:
        """The recipient layers that the organ replaces; empty for an insertion."""
        return range(self.position, self.position + (self.num_layers if self.mode == "replace" else 0))


class StackEntry(NamedTuple):
    """The origin of a layer in a stack."""

    organ: str | None  # name of the organ, `None` for the recipient
    layer: int  # index in the organ or recipient


def is_plain_name(name: Any) -> bool:
    """Whether a name is valid for an organ, and so for a folder."""
    return isinstance(name, str) and bool(name.strip()) and name.isprintable() and not set(name) & set("./\\")


def require_distinct(names: Sequence[str], where: str = "", error: type[NotHFError] = NotHFError) -> None:
    """Raise `error` if two organs have the same name."""
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise error(f"{where}several organs are named {twice[0]!r}; give each its own name")


def require_free_names(names: Sequence[str], taken: Sequence[str]) -> None:
    """Check names of organs to be loaded into a model.

    Raises:
        NotHFError: A name is invalid, taken, or given twice.
    """
    for name in names:
        if not is_plain_name(name):
            raise NotHFError(f"donor_name must be a plain name, without dots and slashes, got {name!r}")
        if name in taken:
            raise NotHFError(f"donor_name {name!r} is taken; choose another name")
    require_distinct(names)


def arrange(num_layers: int, places: Sequence[Place]) -> list[StackEntry]:
    """Arrange the stack of a recipient with organs, front to back.

    Args:
        num_layers: Number of the recipient's own layers.
        places: Places of the organs, in load order; each must fit the recipient by itself.

    Raises:
        IncompatibleDonorError: Two organs overlap.
    """
    owners: dict[int, str] = {}  # names of organs by replaced layer
    for place in places:
        if taken := sorted(owners.keys() & set(place.replaced)):
            raise IncompatibleDonorError(
                f"recipient layers {taken} are already replaced by organ {owners[taken[0]]!r}; "
                f"move organ {place.name!r}, or deactivate one of them"
            )
        owners |= dict.fromkeys(place.replaced, place.name)
    inside = {n for place in places for n in place.replaced[1:]}
    stack: list[StackEntry] = []
    for n in range(num_layers + 1):
        for place in (place for place in places if place.position == n):
            if n in inside:
                raise IncompatibleDonorError(
                    f"position {n} of organ {place.name!r} is inside a span that organ {owners[n]!r} replaces; "
                    "move or deactivate one of them"
                )
            stack += [StackEntry(place.name, i) for i in range(place.num_layers)]
        if n < num_layers and n not in owners:
            stack.append(StackEntry(None, n))
    return stack
