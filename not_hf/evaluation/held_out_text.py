"""A text in three parts: to train on, to choose by, and to test with."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from huggingface_hub.utils import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from not_hf.architecture.layers import eval_mode
from not_hf.errors import NotHFError
from not_hf.evaluation.bootstrap import Floats
from not_hf.evaluation.windows import batches_of, nll_of
from not_hf.training.data import tokenize

Blocks = list[list[int]]  # token ids, all of one length
T = TypeVar("T")

_TEST, _CHOOSE = (2, 7), (4,)  # of ten passages
_PASSAGES = 20  # a text of fewer is dealt by blocks
_MOST = {"choose": 100, "test": 200, "control": 200}  # blocks that are scored
_BATCH_SIZE = 8  # of them per forward pass


@dataclass(frozen=True)
class TextParts:
    """Blocks of the three parts of a text.

    Args:
        train: Seven tenths of the text.
        choose: One tenth.
        test: Two tenths.
        dealt_by: `"passage"`: whole documents, short ones together, so no document is in two parts; or `"block"`.
    """

    train: Blocks
    choose: Blocks
    test: Blocks
    dealt_by: str

    @classmethod
    def of(cls, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, block_length: int) -> TextParts:
        """Deal a text into its parts, spread over its length.

        Raises:
            NotHFError: There is too little text.
        """
        documents = tokenized(texts, tokenizer)
        stream = list(itertools.chain.from_iterable(documents))
        if len(stream) < 10 * block_length:
            raise NotHFError(
                f"the text has {len(stream):,} tokens, too few to train on blocks of {block_length} and to hold some "
                f"out; give at least {10 * block_length:,} tokens, or a smaller block_length"
            )
        dealt, dealt_by = _passages(documents, block_length), "passage"
        if len(dealt) < _PASSAGES:
            dealt, dealt_by = _blocks(stream, block_length), "block"

        def part(places: Iterable[int]) -> Blocks:
            chosen = [ids for n, ids in enumerate(dealt) if n % 10 in places]
            return _blocks(list(itertools.chain.from_iterable(chosen)), block_length)

        rest = set(range(10)) - {*_TEST, *_CHOOSE}
        return cls(part(rest), part(_CHOOSE), part(_TEST), dealt_by)


@dataclass(frozen=True)
class HeldOut:
    """Blocks on which models are scored, each on its own.

    Args:
        parts: Blocks by what they are: `"choose"`, `"test"` and, with a control text, `"control"`.
    """

    parts: dict[str, Blocks]

    @classmethod
    def of(cls, parts: Mapping[str, Blocks]) -> HeldOut:
        """Take as many blocks of each part as make narrow intervals."""
        return cls({name: spread(blocks, _MOST[name]) for name, blocks in parts.items()})

    @property
    def num_blocks(self) -> int:
        """Number of blocks in all parts."""
        return sum(map(len, self.parts.values()))

    def affordable(self, model: PreTrainedModel, seconds: float, num_passes: int) -> tuple[HeldOut, float]:
        """Keep as many blocks, spread over each part, as can be scored in a time; at least the two of an interval.

        Args:
            model: The base, which tells how long a block takes.
            seconds: For all passes.
            num_passes: How often each block is scored.

        Returns:
            The blocks, and the seconds that scoring them will take.
        """
        some = HeldOut({"test": spread(self.parts["test"], _BATCH_SIZE)})
        some.score(model, "speed")  # sets up
        started = time.perf_counter()
        some.score(model, "speed")
        per_block = num_passes * (time.perf_counter() - started) / some.num_blocks
        share = min(1, seconds / (per_block * self.num_blocks))
        kept = HeldOut({name: spread(each, max(2, int(share * len(each)))) for name, each in self.parts.items()})
        return kept, per_block * kept.num_blocks

    def score(self, model: PreTrainedModel, name: str) -> dict[str, Floats]:
        """Sum the negative log-likelihood of each block but for its first token, in nats, with a progress bar.

        Args:
            model: A causal LM.
            name: What it is, for the progress bar.
        """
        found = {}
        with (
            eval_mode(model),
            tqdm(desc=f"Measuring {name}", unit=" blocks", total=self.num_blocks, delay=2, leave=False) as bar,
        ):
            for part, blocks in self.parts.items():
                nats: list[float] = []
                for batch in batches_of(blocks, len(blocks[0]), len(blocks[0]), _BATCH_SIZE):
                    nats += nll_of(model, blocks, batch)
                    bar.update(len(batch))
                found[part] = np.array(nats)
        return found


def control_blocks(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, block_length: int) -> Blocks:
    """Cut a control text into blocks.

    Raises:
        NotHFError: There is too little text.
    """
    blocks = _blocks(list(itertools.chain.from_iterable(tokenized(texts, tokenizer))), block_length)
    if len(blocks) < 2:
        raise NotHFError(
            f"the control text has fewer than {2 * block_length} tokens, two blocks; give more, or leave it out"
        )
    return blocks


def spread(rows: list[T], most: int) -> list[T]:
    """Choose so many rows, evenly spread; all of them if there are no more."""
    count = min(most, len(rows))
    return [rows[n * len(rows) // count] for n in range(count)]


def tokenized(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Tokenize texts as `pack` does, some at a time; empty ones give nothing."""
    some: Any = (texts[n : n + 1000] for n in range(0, len(texts), 1000))
    return [ids for each in some for ids in tokenize(each, tokenizer)["input_ids"]]


def _passages(documents: Blocks, length: int) -> Blocks:
    """Join documents, in their order, until each passage has at least this many tokens; the last may have fewer."""
    found: Blocks = [[]]
    for ids in documents:
        if len(found[-1]) >= length:
            found.append([])
        found[-1].extend(ids)
    return found


def _blocks(stream: list[int], length: int) -> Blocks:
    """Cut tokens into blocks; the end that fills none is dropped."""
    return [stream[n : n + length] for n in range(0, len(stream) - length + 1, length)]
