"""Notices a cache that another stack has filled: it holds keys and values by the numbers of layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import Cache

from not_hf.errors import NotHFError
from not_hf.recipient.surgery import Surgery

_INSERTED = "_not_hf_inserted"  # attribute of a cache: the places of the organs that were inserted when it was filled


class FilledCache:
    """The cache that goes into and comes out of a forward pass of a model.

    Organs that replace others, or that stand at the same place, may go on from it, as adapters of PEFT may.
    """

    def __init__(self, surgery: Surgery) -> None:
        places = [surgery.organs[name].place for name in surgery.active]
        self._inserted = sorted((place.position, place.num_layers) for place in places if place.mode == "insert")

    def check(self, inputs: Iterable[Any]) -> None:
        """Check that the cache among the inputs, if there is one, was filled by a stack of the same shape.

        Raises:
            NotHFError: Other organs were inserted then.
        """
        for cache in inputs:
            if not isinstance(cache, Cache) or vars(cache).get(_INSERTED, self._inserted) == self._inserted:
                continue
            if any(layer.get_seq_length() for layer in cache.layers if hasattr(layer, "get_seq_length")):
                raise NotHFError(
                    "the cache was filled while other organs were inserted, or none, and holds keys and values by the "
                    "numbers of layers; begin a new one, or share what lies below the organs: model.prefill()"
                )

    def note(self, outputs: Iterable[Any]) -> None:
        """Note on the cache among the outputs what has filled it."""
        for cache in outputs:
            if isinstance(cache, Cache):
                vars(cache)[_INSERTED] = self._inserted
