"""Texts as windows of tokens, and their negative log-likelihood under a causal language model."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from not_hf.architecture.devices import input_device
from not_hf.architecture.stack import layers_config
from not_hf.errors import NotHFError
from not_hf.evaluation.bootstrap import Floats
from not_hf.recipient.mixin import Recipient


def context_of(config: PreTrainedConfig) -> float:
    """Return the number of tokens that a model can read at once; infinite if its config does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf


def default_window(context: float) -> int:
    """Return the tokens per window unless `max_length` says otherwise; `stride` is half of it."""
    return int(min(1024, context))


def check_lengths(context: float, max_length: int | None, stride: int | None, batch_size: int) -> tuple[int, int]:
    """Check the lengths of windows, and return `max_length` and `stride` with their defaults."""
    max_length = default_window(context) if max_length is None else max_length
    stride = max_length // 2 if stride is None else stride
    if not 2 <= max_length <= context:
        raise NotHFError(f"max_length must be between 2 and {context}, the model's context, got {max_length}")
    if not 1 <= stride <= max_length:
        raise NotHFError(f"stride must be between 1 and {max_length}, the max_length, got {stride}")
    if batch_size < 1:
        raise NotHFError(f"batch_size must be at least 1, got {batch_size}")
    return max_length, stride


def needs_organs(model: Recipient, texts: Iterable[Sequence[int]]) -> bool:
    """Whether token ids are among those for which only the organs of a model have rows."""
    most, own = layers_config(model.config).vocab_size, model.base_config.vocab_size
    return bool(most > own and any(max(ids, default=0) >= own for ids in texts))


class Window(NamedTuple):
    """Tokens `[begin, end)` of a text, of which `[scored, end)` are scored; begin < scored."""

    text: int
    begin: int
    scored: int
    end: int

    @property
    def context(self) -> int:
        """Number of tokens that are only read."""
        return self.scored - self.begin


def batches_of(texts: list[list[int]], max_length: int, stride: int, batch_size: int) -> list[list[Window]]:
    """Split texts into windows, and group these into batches of those that only read as many tokens."""
    windows = [w for i, ids in enumerate(texts) for w in _windows(i, len(ids), max_length, stride)]
    windows.sort(key=lambda w: (w.context, w.begin - w.end))  # longest first: little padding, early out-of-memory
    groups = [list(group) for _, group in itertools.groupby(windows, key=lambda w: w.context)]
    return [group[i : i + batch_size] for group in groups for i in range(0, len(group), batch_size)]


def _windows(text: int, num_tokens: int, max_length: int, stride: int) -> Iterator[Window]:
    """Yield the windows of a text that score at least one token."""
    covered = 0
    for begin in range(0, num_tokens, stride):
        end = min(begin + max_length, num_tokens)
        scored = max(covered, begin + 1)  # the first token of a window has no context
        if scored < end:
            yield Window(text, begin, scored, end)
        covered = end


@torch.no_grad()
def nll_of(model: PreTrainedModel, texts: list[list[int]], batch: list[Window]) -> list[float]:
    """Sum the negative log-likelihood (nats) of the scored tokens of each window."""
    found = scored_logits(model, texts, batch)
    return torch.stack([cross_entropy(logits, targets, reduction="sum") for logits, targets in found]).tolist()


def scored_logits(
    model: PreTrainedModel, texts: list[list[int]], batch: list[Window]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Run a batch of windows; yield of each the float32 logits and the ids, `(scored, vocab)` and `(scored,)`."""
    longest = max(window.end - window.begin for window in batch)
    # padded on the right with any id: positions count from 0, and causal attention never reaches the padding
    input_ids = torch.zeros(len(batch), longest, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)  # (batch, seq)
    for row, window in enumerate(batch):
        length = window.end - window.begin
        input_ids[row, :length] = torch.tensor(texts[window.text][window.begin : window.end])
        attention_mask[row, :length] = 1
    device = input_device(model)
    input_ids, attention_mask = input_ids.to(device), attention_mask.to(device)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:  # the head runs where tokens are scored
        inputs["logits_to_keep"] = longest + 1 - min(window.context for window in batch)
    logits = model(**inputs).logits  # (batch, kept, vocab)
    skipped = longest - logits.shape[1]
    for row, window in enumerate(batch):  # only one row of float32 logits at a time
        scored = slice(window.context, window.end - window.begin)
        predicting = slice(scored.start - 1 - skipped, scored.stop - 1 - skipped)
        yield logits[row, predicting].float(), input_ids[row, scored].to(logits.device)


def encode(
    predictions: Sequence[str], tokenizer: PreTrainedTokenizerBase, add_start_token: bool
) -> tuple[list[list[int]], list[Floats]]:
    """Tokenize texts without special tokens, except BOS if `add_start_token`.

    Returns:
        The token ids of each text, and the UTF-8 bytes of the text up to the end of each of these tokens.
    """
    bos = tokenizer.bos_token_id
    if add_start_token and bos is None:
        raise NotHFError("the tokenizer has no BOS token; pass add_start_token=False, or set tokenizer.bos_token")
    start = [bos] if add_start_token else []
    is_fast = bool(getattr(tokenizer, "is_fast", False))
    texts, ends = [], []
    for i in range(0, len(predictions), 1000):  # a fast tokenizer's encodings take far more memory than their ids
        some = list(predictions[i : i + 1000])
        found = tokenizer(some, add_special_tokens=False, return_offsets_mapping=is_fast, verbose=False)
        spans = found["offset_mapping"] if is_fast else itertools.repeat(None)
        for text, ids, each in zip(some, found["input_ids"], spans, strict=False):
            texts.append(start + list(ids))
            ends.append(np.append(np.zeros(len(start)), _byte_ends(text, len(ids), each)))
    if short := [i for i, ids in enumerate(texts) if len(ids) < 2]:
        hint = "remove empty texts" if add_start_token else "remove them, or pass add_start_token=True"
        raise NotHFError(f"{len(short)} of {len(texts)} texts have no token to score, first: {short[0]}; {hint}")
    return texts, ends


def _byte_ends(text: str, num_tokens: int, spans: Sequence[tuple[int, int]] | None) -> Floats:
    """Count the UTF-8 bytes of a text up to the end of each token, `(num_tokens,)`.

    Of two tokens, the later one has what stands between them, such as a space, and a character that both are part of.

    Args:
        text: The text.
        num_tokens: Number of its tokens.
        spans: Their first characters and the ends of their last ones; `None`: unknown, so all count as equally long.
    """
    if spans is None or not num_tokens:
        return np.linspace(0, len(text.encode()), num_tokens + 1)[1:]
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    bytes_before = np.append(0.0, np.cumsum(1 + (codes > 0x7F) + (codes > 0x7FF) + (codes > 0xFFFF)))
    begins, ends = np.array(spans).T
    ends[:-1] = np.minimum(ends[:-1], begins[1:])
    ends[-1] = len(text)
    return bytes_before[np.maximum.accumulate(ends)]
