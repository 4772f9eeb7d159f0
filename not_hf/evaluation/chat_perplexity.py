"""Perplexity of the assistant's turns in conversations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from not_hf.architecture.layers import eval_mode
from not_hf.evaluation.perplexity import perplexity_of
from not_hf.evaluation.windows import needs_organs


def measure_chat(model: Any, examples: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Measure a transplanted model on examples of `tokenize_chat`.

    Returns:
        `num_tokens` that have a label, and their `perplexity`: `after` the transplant, and `before` it, without the
        organ, unless that has the only rows for a token.
    """
    after = _perplexity(model, examples)
    if needs_organs(model, (example["input_ids"] for example in examples)):
        return {"after": after}
    with model.disable_donors():
        before = _perplexity(model, examples)
    return {"before": before, "after": after}


@torch.no_grad()
def _perplexity(model: PreTrainedModel, examples: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the perplexity of all tokens that have a label, and their number."""
    total, count = 0.0, 0
    with eval_mode(model):
        for example in examples:
            ids, labels = (torch.tensor([example[key]], device=model.device) for key in ("input_ids", "labels"))
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()  # (seq - 1, vocab)
            wanted = labels[0, 1:].long()
            total += functional.cross_entropy(logits, wanted, reduction="sum").item()
            count += int((wanted != -100).sum())
    return {"perplexity": perplexity_of(total / count), "num_tokens": count}
