"""Plain attributes that a model derives from its config when it is built, and that change with its stack."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from not_hf.architecture.splicing import place_attributes
from not_hf.architecture.twin import Twin

Attributes = dict[tuple[str, str], Any]  # by module name and attribute


class DerivedAttributes:
    """Such attributes of one model, by stack, since finding them builds twins.

    Args:
        base_layers: The layers of the base.
    """

    def __init__(self, base_layers: Iterable[nn.Module]) -> None:
        self._by_stack: dict[str, tuple[Attributes, list[Attributes]]] = {
            "": ({}, [place_attributes(layer) for layer in base_layers])
        }
        self._of_base: Attributes = {}

    def __contains__(self, stack: str) -> bool:
        """Whether the attributes of a model with a stack are known."""
        return stack in self._by_stack

    def note(self, stack: str, base: Twin, here: Twin) -> None:
        """Find the attributes of a model with a stack.

        Args:
            stack: Tells one stack from another; empty for the base's.
            base: The twin of the base.
            here: That of the model with the stack.
        """
        old, new = base.outer_attributes, here.outer_attributes
        changed = {key: new[key] for key in old.keys() & new.keys() if old[key] != new[key]}
        self._by_stack[stack] = changed, [place_attributes(layer) for layer in here.stack.layers]
        self._of_base.update({key: old[key] for key in changed})

    def of(self, stack: str) -> tuple[Attributes, list[Attributes]]:
        """Return those of the modules outside a stack that any so far has changed, and `place_attributes` by layer."""
        changed, of_places = self._by_stack[stack]
        return {**self._of_base, **changed}, of_places
