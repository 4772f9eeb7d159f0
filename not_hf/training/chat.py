"""Conversations as examples: by the tokenizer's chat template, with the loss on the assistant's turns."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any

from datasets import Dataset, Features, IterableDataset, List, Value
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from not_hf.errors import NotHFError

logger = logging.getLogger(__name__)

IGNORED = -100  # label of a token that the loss leaves out
EXAMPLE = Features(input_ids=List(Value("int32")), labels=List(Value("int32")))
_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")  # what transformers takes for the start of an assistant's turn


def tokenize_chat(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    column: str = "messages",
    num_proc: int | None = None,
) -> Dataset | IterableDataset:
    """Tokenize conversations by the tokenizer's chat template; only the assistant's turns have labels.

    Where the template marks these turns (`{% generation %}`), the marks are used. Otherwise a turn is what the
    template adds to the conversation so far and its generation prompt, end of turn included, if the whole conversation
    begins with just that.

    Each conversation is one example. Longer ones are cut off at `max_length`, and those left without a label are
    dropped. `DataCollatorForSeq2Seq(tokenizer)` pads them to batches.

    Args:
        dataset: Conversations, each a list of dicts with `role` and `content`. Keys whose value is `None` are left
            out, in tool calls too.
        tokenizer: The tokenizer of the model to be trained, with a chat template.
        max_length: Tokens per example at most.
        column: Column that holds the conversations; others are dropped.
        num_proc: Number of processes for a `Dataset`; not used for an `IterableDataset`.

    Returns:
        A dataset of the same kind with `input_ids` and `labels`, -100 where there is none; int32.

    Raises:
        NotHFError: The tokenizer has no chat template, the assistant's turns cannot be told from the others, or no
            conversation of a `Dataset` has one. Those of an `IterableDataset` raise it when they are read.

    Examples:
        >>> from datasets import Dataset
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import PreTrainedTokenizerFast
        >>> from not_hf import tokenize_chat
        >>> words = ["user", "assistant", "</s>", "what", "was", "the", "word"]
        >>> tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}))
        >>> tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
        >>> tokenizer.chat_template = (
        ...     "{% for m in messages %}{{ m.role + ' ' + m.content + ' </s> ' }}{% endfor %}"
        ...     "{% if add_generation_prompt %}assistant {% endif %}"
        ... )
        >>> turns = [{"role": "user", "content": "what was"}, {"role": "assistant", "content": "the word"}]
        >>> tokenize_chat(Dataset.from_dict({"messages": [turns]}), tokenizer, max_length=16)[0]
        {'input_ids': [0, 3, 4, 2, 1, 5, 6, 2], 'labels': [-100, -100, -100, -100, -100, 5, 6, 2]}
    """
    if tokenizer.chat_template is None:
        raise NotHFError("the tokenizer has no chat template; set tokenizer.chat_template, or use a chat model")
    if not tokenizer.is_fast:
        raise NotHFError(f"conversations need a fast tokenizer, got {type(tokenizer).__name__}; use its fast version")
    how: dict[str, Any] = {
        "batched": True,
        "with_indices": True,
        "input_columns": column,
        "features": EXAMPLE,
        "fn_kwargs": {"tokenizer": tokenizer, "max_length": max_length},
    }
    chats = dataset.select_columns([column]).with_format(None)
    if isinstance(chats, IterableDataset):
        return chats.map(_examples, remove_columns=column, **how)
    examples = chats.map(_examples, remove_columns=column, num_proc=num_proc, desc="Tokenizing", **how)
    if not len(examples):
        raise NotHFError(f"no conversation has a turn of the assistant within its first {max_length} tokens")
    if dropped := len(chats) - len(examples):
        logger.warning(
            "%d of %d conversations have no turn of the assistant within their first %d tokens, and are left out",
            *(dropped, len(chats), max_length),
        )
    return examples


def chat_column(dataset: Dataset | IterableDataset, column: str) -> str | None:
    """Name the column of conversations: `column`, or `messages` where that is `text` and missing; `None` for text."""
    row: Any = next(iter(dataset), {})
    if column == "text" and column not in row:
        column = "messages"
    turns = row.get(column)
    is_chat = isinstance(turns, list) and turns and all(isinstance(turn, dict) and "role" in turn for turn in turns)
    return column if is_chat else None


def _examples(
    chats: list[list[dict[str, Any]]], rows: list[int], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> dict[str, list[list[int]]]:
    """Tokenize conversations; leave out those without a label."""
    found: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    for row, chat in zip(rows, chats, strict=True):
        turns = _without_nulls(chat or [])
        if not any(turn.get("role") == "assistant" for turn in turns):
            continue
        try:
            ids, mask = _tokenize(turns, tokenizer)
        except TemplateError as error:
            raise NotHFError(f"the chat template refuses conversation {row}: {error}") from error
        except _NotAPrefix as error:
            raise NotHFError(
                f"the chat template has no {{% generation %}} markers, and renders turn {error.turn} of conversation "
                f"{row} differently in the whole of it, so the assistant's tokens cannot be found; add the markers to "
                "the tokenizer's chat_template"
            ) from error
        labels = [token if is_own else IGNORED for token, is_own in zip(ids, mask, strict=True)][:max_length]
        if any(label != IGNORED for label in labels[1:]):  # nothing predicts the first token
            found["input_ids"].append(ids[:max_length])
            found["labels"].append(labels)
    return found


def _without_nulls(value: Any) -> Any:
    """Remove keys whose value is `None`, as TRL does: a table holds it for what other turns or tool calls have."""
    if isinstance(value, list):
        return [_without_nulls(each) for each in value]
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return value


class _NotAPrefix(Exception):
    """A conversation does not begin with what the template makes of its first turns."""

    def __init__(self, turn: int) -> None:
        self.turn = turn


def _tokenize(turns: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    """Tokenize a conversation, and tell which tokens are the assistant's."""
    if _MARKER.search(tokenizer.get_chat_template()):
        found: Any = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
        return found["input_ids"], [bool(each) for each in found["assistant_masks"]]

    def render(count: int, **options: Any) -> str:
        return str(tokenizer.apply_chat_template(turns[:count], tokenize=False, **options))

    spans = _spans(turns, render)
    found = tokenizer(render(len(turns)), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    mask = [any(start < b and end > a for a, b in spans) for start, end in found["offset_mapping"]]
    return found["input_ids"], mask


def _spans(turns: list[dict[str, Any]], render: Callable[..., str]) -> list[tuple[int, int]]:
    """Find the assistant's turns in a rendered conversation, as ranges of characters."""
    text, spans = render(len(turns)), []
    for n, turn in enumerate(turns):
        if turn.get("role") == "assistant":
            if not n:
                raise _NotAPrefix(n)
            before, after = render(n, add_generation_prompt=True), render(n + 1)
            if not (after.startswith(before) and text.startswith(after)):
                raise _NotAPrefix(n)
            spans.append((len(before), len(after)))
    return spans
