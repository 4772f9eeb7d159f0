"""Load a model that is to be run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_model(model: str, base: str | None) -> tuple[Any, PreTrainedTokenizerBase]:
    """Load a model, with organs if it is a donor, and its tokenizer; on the accelerator if there is one.

    Args:
        model: Donor or model: folder or Hub ID.
        base: Recipient of the donor; `None`: the base the donor was cut from.
    """
    import torch
    from transformers import AutoTokenizer

    from not_hf.recipient.heads import writing_class

    kind: Any = writing_class(base or model)
    tokenizer = AutoTokenizer.from_pretrained(base or model)
    loaded = kind.from_pretrained(base, model) if base else kind.native_auto_class.from_pretrained(model)
    return loaded.to(torch.accelerator.current_accelerator(check_available=True) or "cpu"), tokenizer


def has_organ(model: Any) -> bool:
    """Whether a model has organs, which can be switched off."""
    from not_hf.recipient.mixin import Recipient

    return isinstance(model, Recipient)
