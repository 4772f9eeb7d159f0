"""The `with` block of `disable_donors()`."""

from __future__ import annotations

import contextlib
import weakref

from transformers import PreTrainedModel

from not_hf.recipient.surgery import Surgery


class WithoutDonors(contextlib.ContextDecorator):
    """Takes the organs out of a model's stack inside a `with` block.

    `surgery` refers to it weakly: if Ctrl-C comes before `__exit__` begins, the block ends with this object, and the
    next use of the model puts the organs back.
    """

    def __init__(self, model: PreTrainedModel, surgery: Surgery) -> None:
        self.model, self.surgery = model, surgery

    def _recreate_cm(self) -> WithoutDonors:
        return WithoutDonors(self.model, self.surgery)

    def __enter__(self) -> None:
        def begin() -> None:
            self.surgery.blocks = (*self.surgery.blocks, weakref.ref(self))

        self.surgery.change(self.model, begin)

    def __exit__(self, *error: object) -> None:
        with self.surgery.changes.lock:
            self.surgery.blocks = tuple(block for block in self.surgery.blocks if block() not in (None, self))
        if vars(self.model).get("_surgery") is self.surgery:  # not unloaded or merged inside the block
            self.surgery.changes.make(self._apply, self._apply)

    def _apply(self) -> None:
        self.surgery.apply(self.model)
