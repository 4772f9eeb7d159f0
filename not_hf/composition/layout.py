"""What organs are called, and where they stand among a recipient's own layers. No model is needed to plan that."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from not_hf.errors import IncompatibleDonorError, NotHFError


class Place(NamedTuple):
    """Where one organ goes."""

    name: str
    position: int  # counts the recipient's own layers
    mode: str
    num_layers: int  # of the organ

    @property
    def replaced(self) -> range:
        """The recipient layers that it replaces; empty for an insertion."""
        return range(self.position, self.position + (self.num_layers if self.mode == "replace" else 0))


class StackEntry(NamedTuple):
    """Where a layer of the new stack comes from."""

    organ: str | None  # its name, `None` for the recipient
    layer: int  # of the organ, or of the recipient


def is_plain_name(name: Any) -> bool:
    """Whether an organ may be called so: it becomes the name of a folder."""
    return isinstance(name, str) and bool(name.strip()) and not set(name) & set("./\\")


def require_distinct(names: Sequence[str], where: str = "", error: type[NotHFError] = NotHFError) -> None:
    """Raise `error` if two organs have one name."""
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise error(f"{where}several organs are named {twice[0]!r}; give each a name of its own")


def require_free_names(names: Sequence[str], taken: Sequence[str]) -> None:
    """Check the names that organs are to have in a model.

    Raises:
        NotHFError: One is not plain, taken, or there twice.
    """
    for name in names:
        if not is_plain_name(name):
            raise NotHFError(f"donor_name {name!r} is not a plain name, without dots and slashes; choose another")
        if name in taken:
            raise NotHFError(f"donor_name {name!r} is taken; choose another")
    require_distinct(names)


def arrange(num_layers: int, places: Sequence[Place]) -> list[StackEntry]:
    """The stack that organs make of a recipient, front to back.

    Args:
        num_layers: Of the recipient.
        places: Of the organs, in load order; each must fit the recipient by itself.

    Raises:
        IncompatibleDonorError: Two organs want the same recipient layers.
    """
    owners: dict[int, str] = {}  # of the recipient layers that are replaced
    for place in places:
        if taken := sorted(owners.keys() & set(place.replaced)):
            raise IncompatibleDonorError(
                f"recipient layers {taken} are already replaced by organ {owners[taken[0]]!r}; "
                f"move organ {place.name!r}, or switch one of them off"
            )
        owners |= dict.fromkeys(place.replaced, place.name)
    inside = {n for place in places for n in place.replaced[1:]}
    stack: list[StackEntry] = []
    for n in range(num_layers + 1):
        for place in (place for place in places if place.position == n):
            if n in inside:
                raise IncompatibleDonorError(
                    f"position {n} of organ {place.name!r} lies inside a span that organ {owners[n]!r} replaces; "
                    "move or switch off one of them"
                )
            stack += [StackEntry(place.name, i) for i in range(place.num_layers)]
        if n < num_layers and n not in owners:
            stack.append(StackEntry(None, n))
    return stack
