"""Examples for training: text in blocks, conversations one by one, and replay mixed in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from datasets import Dataset, IterableDataset, concatenate_datasets, interleave_datasets
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase, default_data_collator

from not_hf.training.chat import EXAMPLE, chat_column, tokenize_chat
from not_hf.training.data import SampleBy, load_rows, pack, text_rows


@dataclass(frozen=True)
class TrainingData:
    """Rows of one column: `text`, or conversations."""

    rows: Any
    column: str
    is_chat: bool

    @classmethod
    def load(
        cls,
        source: str,
        *,
        column: str = "text",
        split: str = "train",
        streaming: bool = False,
        sample_by: SampleBy | None = None,
    ) -> TrainingData:
        """Load text as `load_text` does, or conversations: in `column`, or in `messages` where there is no `text`.

        Raises:
            NotHFError: As `load_text`.
        """
        dataset = load_rows(source, split=split, streaming=streaming, sample_by=sample_by)
        if chats := chat_column(dataset, column):
            return cls(dataset.select_columns([chats]), chats, is_chat=True)
        return cls(text_rows(dataset, column, source), "text", is_chat=False)

    def examples(self, tokenizer: PreTrainedTokenizerBase, length: int) -> Dataset | IterableDataset:
        """Make blocks of that many tokens, or examples of at most so many."""
        make: Any = tokenize_chat if self.is_chat else pack
        return make(self.rows, tokenizer, length, column=self.column)


def mix_replay(examples: Any, replay: Any, fraction: float, seed: int) -> Dataset | IterableDataset:
    """Add examples of another text, which are the same ones in each epoch; of a stream the first ones.

    Args:
        examples: What is to be learned; each example comes once.
        replay: What is to be remembered; repeated where there is too little of it.
        fraction: Share of all examples that it makes up, between 0 and 1; of a stream, the share on average,
            so that their number differs a little by epoch.
        seed: Chooses them.
    """
    if examples.features != replay.features:  # blocks have one length
        examples, replay = examples.cast(EXAMPLE), replay.cast(EXAMPLE)
    if isinstance(examples, IterableDataset):
        return interleave_datasets([examples, replay.repeat(None)], probabilities=[1 - fraction, fraction], seed=seed)
    count = max(1, round(len(examples) * fraction / (1 - fraction)))
    chosen = replay.shuffle(seed=seed).select([n % len(replay) for n in range(count)])
    return concatenate_datasets([examples, chosen])


def collator(tokenizer: PreTrainedTokenizerBase, has_chats: bool) -> Any:
    """Return what makes batches: of blocks, or of examples of any length, padded on the right."""
    if not has_chats:
        return default_data_collator
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:  # masked and without labels, so any token will do
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return DataCollatorForSeq2Seq(tokenizer)
