"""Plain attributes that a model derives from its config when it is built, and that change with its stack."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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

    def of(self, stack: str, twins: Callable[[], tuple[Twin, Twin]]) -> tuple[Attributes, list[Attributes]]:
        """Return the attributes of a model with a stack.

        Args:
            stack: Tells one stack from another; empty for the base's.
            twins: Returns the twins of the base and of the model with that stack.

        Returns:
            Those of the modules outside the stack that any stack so far has changed, and `place_attributes` by layer.
        """
        if stack not in self._by_stack:
            base, here = twins()
            old, new = base.outer_attributes, here.outer_attributes
            changed = {key: new[key] for key in old.keys() & new.keys() if old[key] != new[key]}
            self._by_stack[stack] = changed, [place_attributes(layer) for layer in here.stack.layers]
            self._of_base.update({key: old[key] for key in changed})
        changed, of_places = self._by_stack[stack]
        return {**self._of_base, **changed}, of_places
