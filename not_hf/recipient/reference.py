"""A transplanted model without its organs, as a second handle on the same weights: what DPO calls the reference."""

from __future__ import annotations

import functools
from typing import Any

from transformers import PreTrainedModel

from not_hf.errors import NotHFError
from not_hf.recipient.mixin import Recipient


def reference_model(model: PreTrainedModel) -> PreTrainedModel:
    """The base of a transplanted model, for trainers that want a reference model (TRL's `ref_model`).

    It shares every module with `model`, so it costs no memory; its `forward` and `generate` run inside
    `model.disable_donors()`. Valid as long as organs stay loaded; not to be sharded (FSDP, ZeRO-3) or saved.

    Args:
        model: A `TransplantedForCausalLM`.

    Returns:
        A model of the native class, with the config of the base.

    Raises:
        NotHFError: `model` carries no organs.
    """
    if not isinstance(model, Recipient):
        raise NotHFError(f"{type(model).__name__} carries no organs; give a TransplantedForCausalLM")
    native: Any = model._surgery.native_class
    view = _reference_class(native).__new__(_reference_class(native))
    shared = {key: value for key, value in vars(model).items() if key not in ("_surgery", "forward")}
    view.__dict__ = {**shared, "config": model.base_config, "_carrier": model}
    return view


@functools.cache
def _reference_class(native: Any) -> Any:
    class Reference(native):
        """The native class, each of whose calls runs without organs."""

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            with self.__dict__["_carrier"].disable_donors():
                return super().__call__(*args, **kwargs)

        def generate(self, *args: Any, **kwargs: Any) -> Any:
            """As in transformers."""
            with self.__dict__["_carrier"].disable_donors():
                return super().generate(*args, **kwargs)

        def train(self, mode: bool = True) -> Any:
            """The modules are the carrier's, whose mode is its own affair."""
            return self

    Reference.__name__, Reference.__qualname__ = native.__name__, native.__qualname__
    return Reference
