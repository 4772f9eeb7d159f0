"""A view of a transplanted model without its organs, which shares the weights: a reference model for DPO."""

from __future__ import annotations

import functools
from typing import Any

from transformers import PreTrainedModel

from not_hf.architecture.layers import eval_mode
from not_hf.architecture.stack import with_layers_config
from not_hf.errors import NotHFError
from not_hf.recipient.mixin import Recipient


def reference_model(model: PreTrainedModel) -> PreTrainedModel:
    """Return a view of a transplanted model without its organs, as a reference model for trainers (TRL's `ref_model`).

    It is of the native class and shares every module with `model`, so it takes no memory. Its `forward` and `generate`
    run inside `model.disable_donors()`, in eval mode, and it has the base's generation config. Do not shard (FSDP,
    ZeRO-3) or save it, nor use it after `unload` or a merge, nor with TRL's `sync_ref_model=True`, which writes into
    the weights of the reference: these are the model's own.

    Raises:
        NotHFError: `model` has no organs.

    Examples:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from not_hf import DonorModel, TransplantedForCausalLM, reference_model
        >>> base = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=4, n_head=2))
        >>> model = TransplantedForCausalLM.from_pretrained(base, DonorModel.from_base(base, layers=(1, 3)))
        >>> model.config.num_hidden_layers, reference_model(model).config.num_hidden_layers
        (6, 4)
    """
    if not isinstance(model, Recipient):
        raise NotHFError(f"{type(model).__name__} has no organs; give a TransplantedForCausalLM")
    native: Any = model._surgery.native_class
    view = _reference_class(native).__new__(_reference_class(native))
    with model.disable_donors():  # the generation config is the base's, too
        shared = {key: value for key, value in vars(model).items() if key not in ("_surgery", "forward")}
    config = with_layers_config(model.config, model.base_config)
    view.__dict__ = {**shared, "config": config, "_carrier": model}
    return view


@functools.cache
def _reference_class(native: Any) -> Any:
    class Reference(native):
        """The native class, run without organs and dropout."""

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            carrier = self.__dict__["_carrier"]
            with carrier.disable_donors(), eval_mode(carrier):
                return super().__call__(*args, **kwargs)

        def generate(self, *args: Any, **kwargs: Any) -> Any:
            """As in transformers."""
            with self.__dict__["_carrier"].disable_donors():
                return super().generate(*args, **kwargs)

        def train(self, mode: bool = True) -> Any:
            """Do nothing: the modules, and so their mode, are those of the transplanted model."""
            return self

    Reference.__name__, Reference.__qualname__ = native.__name__, native.__qualname__
    return Reference
