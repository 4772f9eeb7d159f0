"""Load text with `datasets`, and pack it into blocks of tokens."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from datasets import Dataset, Features, IterableDataset, List, Value, load_dataset
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedTokenizerBase

from not_hf.errors import NotHFError
from not_hf.training.text_files import builder_of, files_of, warn_of_files_left_out
from not_hf.training.wrapping import wrapped_at

logger = logging.getLogger(__name__)

SampleBy = Literal["line", "paragraph", "document"]
_LINES = 2000  # of a text by which its line breaks are judged


def load_text(
    source: str | os.PathLike[str],
    *,
    split: str = "train",
    column: str = "text",
    streaming: bool = False,
    name: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    sample_by: SampleBy | None = None,
) -> Dataset | IterableDataset:
    r"""Load text for training or evaluation as a dataset with exactly one column, `text`.

    Rows without text (null or whitespace, such as the blank lines of a file) are dropped.

    Args:
        source: A `.txt`, `.md`, `.jsonl`, `.json` or `.csv` file, compressed or not, or a `.parquet` file, local or a
            URL; a glob of such files; a folder, in which `datasets` finds files (all are `train`, unless some are
            named after a split, such as `test.txt`, and then only those are read; files that are left out are logged;
            a folder of `.md` files is all `train`); or a Hub dataset ID.
        split: Split, or slice of one such as `"train[:90%]"` (not when streaming). A file or a glob has one
            split, `train`.
        column: Column that holds the text. Plain text files have none; it is ignored there.
        streaming: Read while iterating, without preparing the whole dataset in the cache.
        name: Configuration of a Hub dataset.
        revision: Branch, tag or commit of a Hub dataset.
        token: Hub token, `None` for the stored one.
        sample_by: What a row of a plain text file is, which `pack` ends with EOS: `"line"`, `"paragraph"` (ended by an
            empty line) or `"document"`, the whole file. `None`: a line, or a paragraph where lines look wrapped, which
            is logged. Files of other kinds have rows of their own.

    Returns:
        A `Dataset`, or an `IterableDataset` when streaming, with the one column `text` (string).

    Raises:
        NotHFError: The column does not exist or holds no text, a file cannot be read, or its format is unknown. The
            rows of a stream are not looked through for text.
        FileNotFoundError: No such file, or no such dataset on the Hub.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from not_hf import load_text
        >>> file = Path(tempfile.mkdtemp(), "verses.txt")
        >>> _ = file.write_text("In the beginning\n\nwas the word\n")
        >>> load_text(file)["text"][:]
        ['In the beginning', 'was the word']
    """
    rows = load_rows(
        source, split=split, streaming=streaming, name=name, revision=revision, token=token, sample_by=sample_by
    )
    return text_rows(rows, column, os.fspath(source))


def load_rows(
    source: str | os.PathLike[str],
    *,
    split: str = "train",
    streaming: bool = False,
    name: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    sample_by: SampleBy | None = None,
) -> Any:
    """Load a dataset with all its columns; arguments and errors are those of `load_text`."""
    source = os.path.expanduser(source)
    if not source:
        raise NotHFError("the name of the text is empty; give a file, a folder or a Hub dataset ID")
    how: dict[str, Any] = {"split": split, "streaming": streaming, "token": token}
    if streaming and "[" in split:
        raise NotHFError(f"a stream has no slices, got split {split!r}; give a whole split, or do not stream")
    files = files_of(source)
    if files and all(os.path.isfile(file) and os.path.getsize(file) == 0 for file in files):
        raise NotHFError(f"{source} is empty; give a file that holds text")
    builder = None if files is None else builder_of(files)

    def load(by: SampleBy) -> Any:
        options = how if by == "line" else {**how, "sample_by": by}  # other builders than that of plain text refuse it
        try:
            if builder is None:
                return load_dataset(source, name, revision=revision, **options)
            return load_dataset(builder, data_files=files, **options)
        except (DatasetGenerationError, TypeError, ValueError) as error:  # an unreadable file, unknown option or split
            if by != "line" and "sample_by" in str(error):  # its builder does not know it: no plain text
                return load("line")
            raise NotHFError(f"cannot read {source}: {error.__cause__ or error}") from error

    if files is None and os.path.isdir(source):
        warn_of_files_left_out(source, name)
    dataset = load(sample_by or "line")
    if sample_by in (None, "line") and (width := _wrapped_at(dataset)):
        rows = "each is a row of its own" if sample_by else "rows are paragraphs"
        logger.warning(
            "lines of %s look wrapped at %d characters, and %s; sample_by (--sample-by) chooses line, paragraph or "
            "document",
            *(source, width, rows),
        )
        dataset = dataset if sample_by else load("paragraph")
    return dataset


def text_rows(dataset: Any, column: str, source: str) -> Dataset | IterableDataset:
    """Reduce a dataset to the column `text`, and to the rows that hold some.

    Args:
        dataset: Rows of any columns.
        column: Column that holds the text; ignored for plain text.
        source: Where it comes from, for an error.
    """
    if _is_plain(dataset):
        column = "text"  # the name that `datasets` gives to the lines
    dataset = _only_column(dataset, column, source)
    if column != "text":
        dataset = dataset.rename_column(column, "text")
    found = dataset.filter(_has_text, input_columns="text", batched=True)
    if isinstance(found, Dataset) and not len(found):
        raise NotHFError(f"{source} holds no text in column {column!r}; give rows that are not empty")
    return found


def pack(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    block_length: int,
    *,
    column: str = "text",
    isolate_documents: bool = False,
    num_proc: int | None = None,
) -> Dataset | IterableDataset:
    """Tokenize texts, join them into one stream of tokens, and cut it into blocks of equal length.

    Each text is tokenized with the tokenizer's own special tokens (a BOS if it adds one) and ends with EOS, if the
    tokenizer has one; empty texts give no tokens. Every token is in exactly one block, in order; only the end of the
    stream that does not fill a block is dropped. Shuffle the blocks rather than the texts.

    Use `default_data_collator` to train on every token. It is the default of `transformers.Trainer` unless that is
    given a tokenizer; `DataCollatorForLanguageModeling(mlm=False)` masks EOS for tokenizers that pad with EOS. Blocks
    have no `attention_mask`, since nothing is padded.

    Blocks of a `Dataset` are memory-mapped from the cache of `datasets`, where the same call finds them again. Blocks
    of an `IterableDataset` are the same, made while reading. They are one shard: of several dataloader workers, one
    tokenizes. Resuming it (`state_dict`) reads the text from the start, without yielding those blocks again.

    With `isolate_documents`, tokens do not attend to other documents in their block, in models that derive their mask
    from `position_ids` that restart; `require_isolation` checks whether a model does. Batches must then have no
    `attention_mask` (`DataCollatorWithPadding` adds one) and keep these `position_ids` (`DataCollatorWithFlattening`
    numbers whole blocks): use `default_data_collator`.

    Args:
        dataset: Texts: from `load_text`, or any dataset with a column of strings.
        tokenizer: The tokenizer of the model to be trained.
        block_length: Tokens per block, at least 2.
        column: Column that holds the text; others are dropped.
        isolate_documents: Add `position_ids` that restart at every document of a block, and label the first token of
            each document -100, since only other documents precede it.
        num_proc: Number of processes that tokenize a `Dataset`; not used for an `IterableDataset`.

    Returns:
        A dataset of the same kind with `input_ids`, `labels` (the same, unless documents are isolated) and, if
        documents are isolated, `position_ids`; `(block_length,)` each, int32.

    Raises:
        NotHFError: `block_length` is below 2, the column does not exist or holds no text, or the text of a
            `Dataset` fills no block.

    Examples:
        >>> from datasets import Dataset
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import PreTrainedTokenizerFast
        >>> from not_hf import pack
        >>> words = ["</s>", "in", "the", "beginning", "was", "word"]
        >>> tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}))
        >>> tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
        >>> blocks = pack(Dataset.from_dict({"text": ["in the beginning", "was the word"]}), tokenizer, block_length=4)
        >>> blocks["input_ids"][:]
        [[1, 2, 3, 0], [4, 2, 5, 0]]
    """
    if block_length < 2:
        raise NotHFError(f"block_length must be at least 2, got {block_length}")
    texts = _only_column(dataset, column, "the dataset").with_format(None)
    how: dict[str, Any] = {
        "batched": True,
        "input_columns": column,
        "remove_columns": column,
        "features": Features(input_ids=List(Value("int32"))),
        "fn_kwargs": {"tokenizer": tokenizer},
    }
    columns = ["input_ids", "labels", *(["position_ids"] if isolate_documents else [])]
    blocks = {
        "features": Features(dict.fromkeys(columns, List(Value("int32"), length=block_length))),
        "gen_kwargs": {"block_length": block_length, "isolate_documents": isolate_documents},
    }
    if isinstance(texts, IterableDataset):
        blocks["gen_kwargs"]["documents"] = texts.map(tokenize, **how).with_format("arrow")
        return IterableDataset.from_generator(_blocks, **blocks)
    documents = texts.map(tokenize, num_proc=num_proc, desc="Tokenizing", **how).with_format("arrow")
    if next(_blocks(documents, block_length, isolate_documents), None) is None:
        raise NotHFError(f"the text has fewer tokens than one block of {block_length}; use a shorter block_length")
    blocks["gen_kwargs"]["documents"] = documents
    return Dataset.from_generator(_blocks, **blocks)


def _wrapped_at(dataset: Dataset | IterableDataset) -> int | None:
    """Return the width at which the lines of a plain text look wrapped, if they do."""
    if not _is_plain(dataset):
        return None
    return wrapped_at(row["text"] for row in itertools.islice(dataset, _LINES))


def _is_plain(dataset: Dataset | IterableDataset) -> bool:
    """Whether a dataset is of plain text files."""
    return bool(dataset.info.builder_name == "text")


def _only_column(dataset: Any, column: str, source: str) -> Any:
    """Select one column, which must exist and hold strings."""
    example: dict[str, Any] = {}
    if dataset.features is None:  # the columns of a stream are known from its first row
        example = next(iter(dataset), {})
        columns = list(example)
        if not columns:
            raise NotHFError(f"{source} is empty")
    else:
        columns = list(dataset.features)
    if column not in columns:
        hint = "" if column == "text" else "; all tables of one command must hold their text in the same --column"
        raise NotHFError(f"{source} has no column {column!r}; choose one of {', '.join(map(repr, columns))}{hint}")
    if dataset.features is None:
        is_text = isinstance(example[column], str | None)
        kind = type(example[column]).__name__
    else:
        feature = dataset.features[column]
        kind = getattr(feature, "dtype", type(feature).__name__)
        is_text = kind in ("string", "large_string")
    if not is_text:
        raise NotHFError(f"column {column!r} of {source} must hold strings, got {kind}; choose another column")
    return dataset.select_columns([column])


def _has_text(texts: list[str | None]) -> list[bool]:
    return [text is not None and not text.isspace() and text != "" for text in texts]


def tokenize(texts: list[str | None], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[list[int]]]:
    """Tokenize the texts that are not empty, each ended by EOS."""
    present = [text for text in texts if text]
    if not present:
        return {"input_ids": []}
    # verbose=False: no warning about texts longer than the context, which would also set a flag on the tokenizer and
    # so change its hash, by which `datasets` finds its cache
    ids = tokenizer(present, return_attention_mask=False, return_token_type_ids=False, verbose=False)["input_ids"]
    eos = tokenizer.eos_token_id
    if eos is not None:
        ids = [document if document[-1:] == [eos] else [*document, eos] for document in ids]
    return {"input_ids": ids}


def _blocks(
    documents: Dataset | IterableDataset, block_length: int, isolate_documents: bool
) -> Iterator[dict[str, list[int]]]:
    """Cut the joined documents (Arrow format, `input_ids`) into blocks, across batches."""
    in_block = np.arange(block_length, dtype=np.int32)
    rest = np.empty((2, 0), dtype=np.int32)  # tokens, and their positions in their documents
    # not iter(), which would give a dataloader worker only its share of the documents
    for batch in documents.iter(batch_size=1000):
        texts = batch["input_ids"].combine_chunks()
        ids, lengths = texts.flatten().to_numpy(), np.diff(texts.offsets.to_numpy())
        in_document = np.arange(len(ids), dtype=np.int32) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        rest = np.concatenate([rest, np.stack([ids, in_document]).astype(np.int32)], axis=1)
        end = rest.shape[1] // block_length * block_length
        for block, positions in rest[:, :end].reshape(2, -1, block_length).swapaxes(0, 1):
            if isolate_documents:
                positions = np.minimum(positions, in_block)  # a document that began in an earlier block restarts at 0
                labels = np.where(positions == 0, -100, block)
                yield {"input_ids": block.tolist(), "labels": labels.tolist(), "position_ids": positions.tolist()}
            else:
                yield {"input_ids": (ids := block.tolist()), "labels": ids}
        rest = rest[:, end:]
