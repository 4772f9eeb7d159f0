"""Generating with a cache and without, behind padding and in several steps."""

from __future__ import annotations

import inspect

import torch
from torch import nn
from transformers import PreTrainedModel

from not_hf.architecture.releases import CACHES_FOLLOW_STATES
from testing.models import TOKEN_IDS

NEW_TOKENS, PADDING = 5, 3

# What transformers 5.24 itself computes otherwise than without a cache, whatever the stack.
NO_BEAMS = {"minimax"}
ONE_PREFILL = {"bamba", "falcon_mamba", "jamba", "mamba"}
if not CACHES_FOLLOW_STATES:  # an older release, in which the bare base of another model does so too
    ONE_PREFILL |= {"doge"}


@torch.no_grad()
def padded(model: PreTrainedModel) -> torch.Tensor:
    """Scores of the tokens behind padding, `(batch, seq, vocab)`."""
    ids, mask = behind_padding()
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    positions = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if takes_positions else {}
    return model(ids, attention_mask=mask, **positions).logits[:, PADDING:]


def behind_padding() -> tuple[torch.Tensor, torch.Tensor]:
    """The prompt with padding on the left, and its mask, both `(batch, PADDING + seq)`."""
    ids, mask = (nn.functional.pad(each, (PADDING, 0)) for each in (TOKEN_IDS, torch.ones_like(TOKEN_IDS)))
    return ids, mask


@torch.no_grad()
def in_chunks(model: PreTrainedModel) -> torch.Tensor:
    """Scores of tokens that a model with a cache reads in two steps, `(batch, seq, vocab)`."""
    first = model(TOKEN_IDS[:, :5], use_cache=True)
    name = next(key for key in ("cache", "cache_params", "past_key_values") if first.get(key) is not None)
    return torch.cat([first.logits, model(TOKEN_IDS[:, 5:], use_cache=True, **{name: first[name]}).logits], dim=1)


def generate(
    model: PreTrainedModel, ids: torch.Tensor = TOKEN_IDS, mask: torch.Tensor | None = None, **options
) -> torch.Tensor:
    """Greedily on from a prompt, `(batch, seq + NEW_TOKENS)`."""
    options |= {"attention_mask": torch.ones_like(ids) if mask is None else mask}
    return model.generate(ids, do_sample=False, max_new_tokens=NEW_TOKENS, **options)


def static_cache_works(base: PreTrainedModel) -> bool:
    """Whether a base itself computes the same scores with a static cache (gpt_neo's local attention does not)."""
    scores = {"output_scores": True, "return_dict_in_generate": True}
    try:
        static = generate(base, cache_implementation="static", **scores).scores
    except (ValueError, TypeError, AttributeError, IndexError, NotImplementedError):
        return False
    dynamic = generate(base, **scores).scores
    return torch.allclose(torch.stack(static), torch.stack(dynamic), atol=1e-4)
