"""Tokens that organs bring with them: which tokenizer a model with organs needs."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from not_hf.architecture.stack import layers_config
from not_hf.recipient.views import ModelWithOrgans


def brings_tokens(model: ModelWithOrgans, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether organs of a model have rows for tokens that the recipient's tokenizer lacks, so theirs is needed."""
    rows = (ids for config in model.donor_config.values() for ids in (config.trainable_token_indices or {}).values())
    has_more = layers_config(model.config).vocab_size > model.base_config.vocab_size
    return has_more or any(max(ids) >= len(tokenizer) for ids in rows)  # some models have spare rows
