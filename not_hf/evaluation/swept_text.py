"""The text of a sweep: a model, and the windows that are scored under it."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from not_hf.architecture.layers import eval_mode
from not_hf.donor.modeling import DonorModel
from not_hf.errors import NotHFError
from not_hf.evaluation.perplexity import load_for_texts, load_model
from not_hf.evaluation.windows import Window, batches_of, check_lengths, context_of, encode, nll_of
from not_hf.recipient.mixin import Recipient
from not_hf.recipient.new_tokens import require_tokens
from not_hf.version import versions


@dataclass(frozen=True)
class SweptText:
    """A text that is scored under one model with an organ at several positions.

    Args:
        model: The model.
        ids: Token ids of the text, or of each row.
        batches: Its windows.
        about: What is recorded of both.
    """

    model: PreTrainedModel
    ids: list[list[int]]
    batches: list[list[Window]]
    about: dict[str, Any]

    @classmethod
    def of(
        cls,
        model: PreTrainedModel | str | os.PathLike[str],
        organ: Any,
        data: Iterable[Any],
        tokenizer: PreTrainedTokenizerBase | str | None,
        add_start_token: bool,
        max_length: int | None,
        stride: int | None,
        batch_size: int,
        *,
        caller: str,
    ) -> Self:
        """Check the arguments of a sweep, load the model if it is given by name, and split the text into windows.

        Args:
            organ: The donor, or a function that returns one for each place.

        Raises:
            NotHFError: An argument is out of range, there is nothing to score, or a tokenizer is missing.
            UnsupportedArchitectureError: The model is no causal LM.
        """
        rows = [] if isinstance(data, str) else list(data)
        if not rows:
            raise NotHFError("data must be texts, or rows with input_ids, at least one; give [text] for one text")
        live, ids = _model_and_ids(model, organ, rows, tokenizer, add_start_token)
        if isinstance(live, Recipient):
            live._surgery.require_layers(caller)
        max_length, stride = check_lengths(context_of(live.config), max_length, stride, batch_size)
        batches = batches_of(ids, max_length, stride, batch_size)
        about = {
            "model": live.name_or_path or None,
            "beside": live.active_donors if isinstance(live, Recipient) else [],
            "windows_digest": _digest(ids, batches),
            **{"max_length": max_length, "stride": stride},
            **versions(),
        }
        return cls(live, ids, batches, about)

    @property
    def num_tokens(self) -> list[int]:
        """Scored tokens of each window."""
        return [window.end - window.scored for batch in self.batches for window in batch]

    @functools.cached_property
    def free_name(self) -> str:
        """A name for an organ that is free in the model."""
        name = "sweep"
        while isinstance(self.model, Recipient) and name in self.model.donor_config:
            name += "_"
        return name

    def score(self) -> list[float]:
        """Sum the negative log-likelihood of each window, in nats, under the model as it is."""
        with eval_mode(self.model):
            return [nats for batch in self.batches for nats in nll_of(self.model, self.ids, batch)]


def _model_and_ids(
    model: PreTrainedModel | str | os.PathLike[str],
    organ: Any,
    rows: list[Any],
    tokenizer: PreTrainedTokenizerBase | str | None,
    add_start_token: bool,
) -> tuple[PreTrainedModel, list[list[int]]]:
    """Return the model, loaded if given by name, and the token ids of the text, or of each row."""
    source: Any = model if isinstance(model, nn.Module) else os.fspath(model)
    if all(isinstance(row, str) for row in rows):
        loaded, tokenizer = load_for_texts(source, None, tokenizer, None)
        if isinstance(organ, DonorModel):
            require_tokens(tokenizer, organ.config)
        return loaded, encode(["\n".join(rows)], tokenizer, add_start_token)[0]
    if not all(isinstance(row, Mapping) and "input_ids" in row for row in rows):
        raise NotHFError("data must be texts, or rows with input_ids; give dataset['text'], or use not_hf.pack")
    ids = [[int(token) for token in row["input_ids"]] for row in rows]
    if short := [n for n, each in enumerate(ids) if len(each) < 2]:
        raise NotHFError(f"{len(short)} of {len(ids)} rows have fewer than 2 tokens, first: {short[0]}; remove them")
    return load_model(source), ids


def _digest(ids: list[list[int]], batches: list[list[Window]]) -> str:
    """Digest the windows, with their tokens."""
    windows = [(ids[w.text][w.begin : w.end], w.end - w.scored) for batch in batches for w in batch]
    return hashlib.sha256(repr(windows).encode()).hexdigest()
