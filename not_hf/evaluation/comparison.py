"""The difference of two models on the same texts."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from not_hf.errors import NotHFError
from not_hf.evaluation.bootstrap import ConfidenceInterval, check_level, nll_difference_intervals
from not_hf.evaluation.live_models import are_one_model
from not_hf.evaluation.perplexity import (
    Scores,
    check_texts,
    load_model,
    load_tokenizer,
    perplexity_of,
    score,
    summarize,
)
from not_hf.evaluation.windows import batches_of, check_lengths, context_of, encode, needs_organs
from not_hf.recipient.heads import recipient_config
from not_hf.recipient.mixin import Recipient

Tokenizer = PreTrainedTokenizerBase | str


def compare_perplexity(
    model_a: PreTrainedModel | str | None,
    model_b: PreTrainedModel | str,
    texts: Iterable[str],
    *,
    tokenizer: Tokenizer | tuple[Tokenizer | None, Tokenizer | None] | None = None,
    batch_size: int = 16,
    add_start_token: bool = True,
    device: str | None = None,
    max_length: int | None = None,
    stride: int | None = None,
    confidence_level: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure how much better or worse a model predicts texts than another one, with a paired interval.

    Both models read the same windows, and both are given the same bootstrap samples of them. So what makes a window
    hard for both does not widen the interval of the difference: it is mostly far narrower than those of the two
    perplexities. An interval that holds 0 (of a ratio: 1) leaves open which model is better.

    Models that tokenize the texts differently are compared by bits per byte, and by texts in place of windows.

    Args:
        model_a: A causal LM, with organs or without, or its Hub ID or folder; `None`: `model_b` without its organs.
            A live one may be wrapped, by PEFT or `torch.compile`.
        model_b: The other model, likewise.
        texts: At least one; at least two, better fifty, where the models tokenize them differently. To score a corpus
            as one stream, join it into one text.
        tokenizer: Of the live models, or of both if none is live; its Hub ID or folder. Beside a live model, an ID or
            folder has its own. `(tokenizer_a, tokenizer_b)` where they have one each; `None`: its own.
        batch_size: Windows per forward pass.
        add_start_token: As for `perplexity`, like `device`, `stride`, `confidence_level` and `seed`.
        max_length: Tokens per window; default: the smaller one of the models' contexts, at most 1024.

    Returns:
        `model_a` and `model_b`: dicts with what `perplexity` returns of all texts. `nats_per_token_difference` and
        `bits_per_byte_difference`: B less A, negative where B is better. `perplexity_ratio`: B over A.
        `confidence_interval`: `(low, high)` of these three, by their names; `None` if there is only one window.
        `paired_by`: `"window"`; or `"text"` if the models tokenize differently, then nats per token do not compare,
        and their difference and the ratio are `None`.

    Raises:
        NotHFError: There are no texts, or one that the models tokenize differently; an argument is out of range; a
            tokenizer is missing; both are one live model; `model_b` is `None`; `model_a` is, and `model_b` has no
            active organs, or they have the only rows for a token.
        UnsupportedArchitectureError: A model is no causal LM.

    Examples:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
        >>> from not_hf import DonorModel, TransplantedForCausalLM, compare_perplexity
        >>> words = Tokenizer(models.WordLevel({"<s>": 0, "in": 1, "the": 2, "beginning": 3}))
        >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>")
        >>> base = GPT2LMHeadModel(GPT2Config(vocab_size=4, n_embd=8, n_layer=4, n_head=2))
        >>> donor = DonorModel.from_base(base, layers=(1, 3), init="identity")
        >>> model = TransplantedForCausalLM.from_pretrained(base, donor)
        >>> found = compare_perplexity(None, model, ["in the beginning", "the beginning"], tokenizer=tokenizer)
        >>> found["perplexity_ratio"], found["confidence_interval"]["perplexity_ratio"]
        (1.0, ConfidenceInterval(low=1.0, high=1.0))
    """
    check_level(confidence_level)
    rows = check_texts(texts, "texts")
    if not rows:
        raise NotHFError("no texts to score; give texts=[text, ...]")
    if model_b is None:
        raise NotHFError("model_b is None; only model_a may be, for model_b without its organs")
    if are_one_model(model_a, model_b):
        raise NotHFError(
            "model_a and model_b are one model: organs and adapters are put into a live model in place; give None as "
            "model_a for model_b without its organs, or load the base once more"
        )
    sources = [model_b if model_a is None else model_a, model_b]
    if isinstance(tokenizer, tuple):
        pair = [*tokenizer]
    else:
        any_live = any(isinstance(each, nn.Module) for each in sources)
        pair = [tokenizer if isinstance(each, nn.Module) or not any_live else None for each in sources]
    tokenizers = [load_tokenizer(*each) for each in zip(sources, pair, strict=True)]
    max_length, stride = check_lengths(
        min(context_of(recipient_config(each)) for each in sources), max_length, stride, batch_size
    )
    (ids_a, ends_a), (ids_b, ends_b) = (encode(rows, each, add_start_token) for each in tokenizers)
    is_same = ids_a == ids_b
    if not is_same and len(rows) < 2:
        raise NotHFError(
            "the models tokenize the text differently, so texts are compared and not windows; give at least 2, got 1"
        )

    def scored(model: PreTrainedModel, ids: list[list[int]], ends: list[Any]) -> Scores:
        return score(model, ids, ends, batches_of(ids, max_length, stride, batch_size))

    if model_a is None:
        model = load_model(model_b, device)
        recipient = next((module for module in model.modules() if isinstance(module, Recipient)), None)  # in a wrapper
        if recipient is None:
            raise NotHFError(f"{type(model).__name__} has no organs to leave out; give a model to compare with")
        if not recipient.active_donors:
            raise NotHFError(
                "no organ is active, so there is none to leave out; activate one with set_donor(), outside of "
                "disable_donors(), or give a model to compare with"
            )
        if needs_organs(recipient, ids_a):
            raise NotHFError(
                "the texts hold tokens for which only the organs have rows; give "
                "tokenizer=(the recipient's, that of the organs) and at least 2 texts, or use perplexity"
            )
        with recipient.disable_donors():
            a = scored(model, ids_a, ends_a)
        b = scored(model, ids_b, ends_b)
    else:  # at most one model that is loaded here is in memory
        a = scored(load_model(model_a, device), ids_a, ends_a)
        b = scored(load_model(model_b, device), ids_b, ends_b)
    return _compare(a, b, is_same, confidence_level, seed)


def _compare(a: Scores, b: Scores, is_same: bool, confidence_level: float, seed: int) -> dict[str, Any]:
    """Compute what `compare_perplexity` returns; `is_same`: the windows of A and B are the same."""
    first, second = (summarize(each, confidence_level, seed) for each in (a, b))
    if not is_same:
        a, b = a.by_text(), b.by_text()

    def interval(weights_a: Any, weights_b: Any) -> tuple[float, float]:
        nats = (a.nats[None], b.nats[None])  # (pairs=1, windows)
        low, high = nll_difference_intervals(nats, (weights_a, weights_b), seed, confidence_level)
        return low.item(), high.item()

    found: dict[str, Any] = dict.fromkeys(("nats_per_token_difference", "perplexity_ratio"), (None, None))
    if is_same:
        nats, ends = second["nats_per_token"] - first["nats_per_token"], interval(a.num_tokens, b.num_tokens)
        found["nats_per_token_difference"] = (nats, ConfidenceInterval(*ends))
        found["perplexity_ratio"] = (perplexity_of(nats), ConfidenceInterval(*map(perplexity_of, ends)))
    bits, ends = second["bits_per_byte"] - first["bits_per_byte"], interval(a.num_bytes, b.num_bytes)
    found["bits_per_byte_difference"] = (bits, ConfidenceInterval(*(end / math.log(2) for end in ends)))
    return {
        "model_a": first,
        "model_b": second,
        **{name: value for name, (value, _) in found.items()},
        "confidence_interval": {name: each if len(a.nats) > 1 else None for name, (_, each) in found.items()},
        "paired_by": "window" if is_same else "text",
    }
