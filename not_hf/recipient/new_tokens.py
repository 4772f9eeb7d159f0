"""Tokens that organs bring with them: which tokenizer a model with organs needs."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from not_hf.architecture.stack import layers_config
from not_hf.config import DonorConfig
from not_hf.donor.tokenizer import lacks_tokens
from not_hf.errors import NotHFError
from not_hf.recipient.views import ModelWithOrgans


def brings_tokens(model: ModelWithOrgans, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether organs of a model have rows for tokens that the recipient's tokenizer lacks, so theirs is needed."""
    has_more = layers_config(model.config).vocab_size > model.base_config.vocab_size
    return has_more or lacks_tokens(tokenizer, *model.donor_config.values())  # some models have spare rows


def require_tokens(tokenizer: PreTrainedTokenizerBase, donor: DonorConfig) -> None:
    """Check that a tokenizer has the tokens that a donor has rows for.

    Raises:
        NotHFError: It lacks some, and would write others in their place.
    """
    if lacks_tokens(tokenizer, donor):
        raise NotHFError(
            "the organ has rows for tokens that the tokenizer lacks; pass tokenizer=, the one that it was trained with"
        )
