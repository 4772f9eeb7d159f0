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

    from not_hf.recipient.heads import writing_class

    kind: Any = writing_class(base or model)
    loaded = kind.from_pretrained(base, model) if base else kind.native_auto_class.from_pretrained(model)
    tokenizer = load_tokenizer(loaded, model, base)
    return loaded.to(torch.accelerator.current_accelerator(check_available=True) or "cpu"), tokenizer


def load_tokenizer(loaded: Any, model: str, base: str | None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model: in another recipient that one's, unless organs have rows for more tokens.

    Args:
        loaded: The model.
        model: As in `load_model`, like `base`.
    """
    from transformers import AutoTokenizer

    from not_hf.recipient.new_tokens import brings_tokens

    tokenizer = AutoTokenizer.from_pretrained(base or model)
    if base is None or not has_organ(loaded) or not brings_tokens(loaded, tokenizer):
        return tokenizer
    return AutoTokenizer.from_pretrained(model)


def has_organ(model: Any) -> bool:
    """Whether a model has active organs, which can be switched off."""
    from not_hf.recipient.mixin import Recipient

    return isinstance(model, Recipient) and bool(model.active_donors)
