"""Loading and packing training text, from files made here."""

from __future__ import annotations

import gzip
import itertools
import json
import logging
import pickle
import textwrap
import warnings
from pathlib import Path

import pytest
import torch
from datasets import Dataset, IterableDataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from torch.utils.data import DataLoader
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from not_hf.errors import NotHFError
from not_hf.training.data import load_text, pack

BLOCK = 64
# more than one batch of `map` and of the packing, of very different lengths
LINES = [f"In the beginning {i} was the word" + " and more" * (i % 23) for i in range(2300)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE like GPT-2's: no pad token, EOS 0, a context far shorter than the longest line."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(LINES[:50], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<|end|>", eos_token="<|end|>", model_max_length=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same lines as text with blank lines between, and as JSON lines under another column name."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "verses.txt").write_text("\n\n".join(LINES) + "\n \n", encoding="utf-8")
    rows = "\n".join(json.dumps({"verse": line, "number": i}) for i, line in enumerate(LINES))
    (folder / "verses.jsonl").write_text(rows, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def stream_of_tokens(tokenizer) -> list[int]:
    """What packing must give, one flat list: the tokens of every line, EOS after each."""
    return [i for line in LINES for i in [*tokenizer(line, verbose=False)["input_ids"], tokenizer.eos_token_id]]


def flat(blocks) -> list[int]:
    return [i for block in blocks for i in block["input_ids"]]


@pytest.mark.parametrize("streaming", [False, True])
def test_load_text_gives_one_column(folder, streaming):
    kind = IterableDataset if streaming else Dataset
    for file, column in [("verses.txt", "text"), ("verses.jsonl", "verse")]:
        dataset = load_text(folder / file, column=column, streaming=streaming)
        assert isinstance(dataset, kind)
        # a stream of JSON lines has no column_names until `datasets` has prepared the file once
        assert list(dataset) == [{"text": line} for line in LINES]  # blank lines are gone


@pytest.mark.parametrize("streaming", [False, True])
def test_plain_text_has_no_columns_to_choose(folder, streaming):
    """A command has one --column for all its texts, of which some are tables and some are not."""
    assert next(iter(load_text(folder / "verses.txt", column="verse", streaming=streaming))) == {"text": LINES[0]}
    with pytest.raises(NotHFError, match=r"no column 'body'; .* 'number'; all tables of one command"):
        load_text(folder / "verses.jsonl", column="body", streaming=streaming)


def test_load_text_formats(tmp_path):
    rows = Dataset.from_dict({"text": ["one", "two"], "other": [1, 2]})
    rows.to_parquet(tmp_path / "rows.parquet")
    rows.to_csv(tmp_path / "rows.csv")
    rows.to_json(tmp_path / "rows.json")
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as file:
        file.write((tmp_path / "rows.json").read_text())
    for file in ["rows.parquet", "rows.csv", "rows.json", "rows.jsonl.gz"]:
        assert load_text(str(tmp_path / file)).to_dict() == {"text": ["one", "two"]}, file
    assert load_text(tmp_path / "rows.json", split="train[1:]").to_dict() == {"text": ["two"]}


def test_load_text_folders_and_globs(tmp_path):
    (tmp_path / "split").mkdir()
    (tmp_path / "split" / "train.txt").write_text("a\nb\n")
    (tmp_path / "split" / "test.txt").write_text("c\n")
    (tmp_path / "notes").mkdir()
    for name, text in [("README.md", "not this"), ("1.md", "one\n\ntwo"), ("2.md", "three")]:
        (tmp_path / "notes" / name).write_text(text)
    assert load_text(tmp_path / "split")["text"][:] == ["a", "b"]
    assert load_text(tmp_path / "split", split="test")["text"][:] == ["c"]
    assert load_text(f"{tmp_path}/split/*.txt")["text"][:] == ["c", "a", "b"]  # in the order of their names
    assert load_text(tmp_path / "notes")["text"][:] == ["one", "two", "three"]


def test_load_text_sample_by(tmp_path):
    (tmp_path / "prose.txt").write_text("one\nwrapped\n\ntwo\n")
    assert load_text(tmp_path / "prose.txt")["text"][:] == ["one", "wrapped", "two"]
    assert load_text(tmp_path / "prose.txt", sample_by="paragraph")["text"][:] == ["one\nwrapped", "two\n"]


def test_load_text_sample_by_is_of_plain_text(tmp_path):
    """The control text of a command may be of another kind."""
    for name in ("one.csv", "folder/two.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text\none\ntwo\n")
    for source in (tmp_path / "one.csv", tmp_path / "folder"):
        assert load_text(source, sample_by="document")["text"][:] == ["one", "two"]


@pytest.mark.parametrize("other", ["more.txt", "more.jsonl"])
def test_files_of_a_folder_that_datasets_leaves_out_are_said(other, tmp_path, caplog):
    for name in ("train.txt", "train-2.txt", other):
        (tmp_path / name).write_text('{"text": "a"}\n')
    assert len(load_text(tmp_path)) == 2
    (record,) = caplog.records
    assert f"1 of 3 text files in {tmp_path} are left out, first {tmp_path / other}: " in record.getMessage()
    caplog.clear()
    (tmp_path / other).unlink()
    assert len(load_text(tmp_path)) == 2 and not caplog.records


GENESIS = (
    "In the beginning God created the heaven and the earth. And the earth was without form, and void; and darkness "
    "was upon the face of the deep. And the Spirit of God moved upon the face of the waters. And God said, Let there "
    "be light: and there was light. And God saw the light, that it was good: and God divided the light from the "
    "darkness. And God called the light Day, and the darkness he called Night."
)


@pytest.mark.parametrize("streaming", [False, True])
def test_prose_with_hard_line_breaks_is_read_by_paragraphs(streaming, tmp_path, caplog, tokenizer):
    paragraphs = [textwrap.fill(text, 68) for text in (GENESIS, GENESIS.upper(), GENESIS[70:])]
    file = tmp_path / "kjv.txt"
    file.write_text("\n\n".join(paragraphs))
    dataset = load_text(file, streaming=streaming)
    assert [row["text"] for row in dataset] == paragraphs
    (record,) = caplog.records
    assert "kjv.txt look wrapped at 68 characters, and rows are paragraphs; sample_by" in record.getMessage()
    assert flat(pack(dataset, tokenizer, 8)).count(tokenizer.eos_token_id) in (2, 3)  # the last may be in the tail
    caplog.clear()
    lines = load_text(file, streaming=streaming, sample_by="line")
    assert [row["text"] for row in lines] == "\n".join(paragraphs).split("\n")
    assert "each is a row of its own" in caplog.records[0].getMessage()
    caplog.clear()
    for by, count in (("paragraph", 3), ("document", 1)):
        assert len(list(load_text(file, streaming=streaming, sample_by=by))) == count
    assert not caplog.records


def test_lines_that_stand_on_their_own_stay_rows(tmp_path, caplog):
    sentences = GENESIS.replace(": ", ". ").split(". ")
    texts = {
        "sentences": [f"{sentence}." for sentence in sentences * 3],
        "verses": LINES[:200],
        "words": ["light", "earth", "void"] * 20,
        "code": Path(textwrap.__file__).read_text().splitlines(),
    }
    for name, lines in texts.items():
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
        assert load_text(tmp_path / f"{name}.txt")["text"][:] == [line for line in lines if line.strip()]
    assert not caplog.records


@pytest.mark.parametrize("streaming", [False, True])
def test_load_text_says_what_is_wrong(folder, tmp_path, streaming):
    def load(source, **kwargs):
        return load_text(source, streaming=streaming, **kwargs)

    with pytest.raises(NotHFError, match="no column 'text'; choose one of 'verse', 'number'"):
        load(folder / "verses.jsonl")
    with pytest.raises(NotHFError, match=r"column 'number' of .* must hold strings, got int"):
        load(folder / "verses.jsonl", column="number")
    with pytest.raises(FileNotFoundError, match=r"no file or folder .*gone\.txt"):
        load(folder / "gone.txt")
    with pytest.raises(FileNotFoundError, match="no file matches"):
        load(f"{folder}/*.csv")
    with pytest.raises(NotHFError, match=r"cannot read \.jsonl, \.txt as one dataset"):
        load(f"{folder}/*")
    (tmp_path / "scan.pdf").write_bytes(b"%PDF")
    with pytest.raises(NotHFError, match=r"cannot read \.pdf"):
        load(tmp_path / "scan.pdf")
    with pytest.raises(NotHFError, match=r"no text files in .*; expected \.txt"):
        load(tmp_path)
    (tmp_path / "empty.txt").touch()
    with pytest.raises(NotHFError, match=r"empty\.txt"):
        load(tmp_path / "empty.txt")
    with pytest.raises(NotHFError, match="the name of the text is empty"):
        load("")
    (tmp_path / "blank.txt").write_text("\n \n")
    if not streaming:
        with pytest.raises(
            NotHFError, match=r"blank\.txt holds no text in column 'text'; give rows that are not empty"
        ):
            load(tmp_path / "blank.txt")
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1" + bytes(20))
    with pytest.raises(NotHFError, match=r"cannot read .*damaged\.parquet"):
        load(tmp_path / "damaged.parquet")
    with pytest.raises(NotHFError, match=r"cannot read .*verses\.jsonl: .*split"):
        load(folder / "verses.jsonl", split="test")


@pytest.mark.slow
def test_pack_loses_and_repeats_nothing(folder, tokenizer, stream_of_tokens):
    blocks = pack(load_text(folder / "verses.txt"), tokenizer, BLOCK)
    assert isinstance(blocks, Dataset)
    assert blocks.column_names == ["input_ids", "labels"]
    assert {len(block) for block in blocks["input_ids"]} == {BLOCK}
    assert blocks["labels"][:] == blocks["input_ids"][:]
    assert len(stream_of_tokens) % BLOCK != 0  # there is a tail to drop
    assert flat(blocks) == stream_of_tokens[: len(stream_of_tokens) // BLOCK * BLOCK]


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_pack_isolates_documents(folder, tokenizer, stream_of_tokens, streaming):
    texts = load_text(folder / "verses.txt", streaming=streaming)
    blocks = list(pack(texts, tokenizer, BLOCK, isolate_documents=True))
    assert [{"input_ids": block["input_ids"]} for block in blocks] == [
        {"input_ids": block["input_ids"]} for block in pack(texts, tokenizer, BLOCK)
    ]
    end = tokenizer.eos_token_id
    for number, block in enumerate(blocks):
        ids, position = block["input_ids"], 0
        for n in range(BLOCK):
            if n == 0 or ids[n - 1] == end:
                position = 0
            assert block["position_ids"][n] == position, (number, n)
            assert block["labels"][n] == (ids[n] if position else -100), (number, n)
            position += 1
    starts = [position for block in blocks for position in block["position_ids"]].count(0)
    assert len(blocks) < starts < len(blocks) + len(LINES)  # documents of many blocks, and blocks of many documents
    assert starts - len(blocks) > len(LINES) // 2


@pytest.mark.slow
def test_pack_isolates_in_dataloader_workers(folder, tokenizer):
    texts = load_text(folder / "verses.txt", streaming=True)
    blocks = pack(texts, tokenizer, BLOCK, isolate_documents=True)
    expected = list(blocks)
    batches = list(DataLoader(blocks, batch_size=50, num_workers=2, collate_fn=default_data_collator))
    for name in ("input_ids", "labels", "position_ids"):
        tensor = torch.cat([batch[name] for batch in batches])  # (blocks, BLOCK)
        assert tensor.dtype == torch.int64 and tensor.tolist() == [block[name] for block in expected]


def test_pack_leaves_the_tokenizer_alone(tokenizer, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    fresh = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|end|>", model_max_length=8
    )
    state = pickle.dumps(fresh)
    pack(Dataset.from_dict({"text": LINES[20:30]}), fresh, BLOCK)
    assert not caplog.records  # longer than model_max_length, and no warning
    assert pickle.dumps(fresh) == state


@pytest.mark.slow
def test_pack_streams_the_same_blocks(folder, tokenizer):
    whole = pack(load_text(folder / "verses.jsonl", column="verse"), tokenizer, BLOCK)
    streamed = pack(load_text(folder / "verses.jsonl", column="verse", streaming=True), tokenizer, BLOCK)
    assert isinstance(streamed, IterableDataset)
    assert list(streamed) == list(whole)
    assert list(streamed) == list(whole)  # nothing left over from the first pass


@pytest.mark.slow
def test_pack_in_processes_gives_the_same_blocks(folder, tokenizer):
    texts = load_text(folder / "verses.txt")
    assert list(pack(texts, tokenizer, BLOCK, num_proc=2)) == list(pack(texts, tokenizer, BLOCK))


@pytest.mark.slow
def test_pack_is_the_same_in_dataloader_workers(folder, tokenizer):
    texts = load_text(folder / "verses.txt")
    whole = pack(texts, tokenizer, BLOCK)
    streamed = pack(texts.to_iterable_dataset(num_shards=4), tokenizer, BLOCK)
    for dataset in (whole, pickle.loads(pickle.dumps(streamed))):
        loader = DataLoader(dataset, batch_size=50, num_workers=2, collate_fn=default_data_collator)
        ids = torch.cat([batch["input_ids"] for batch in loader])
        assert ids.dtype == torch.int64
        assert ids.tolist() == whole["input_ids"][:]


def test_pack_finds_its_cache_again(folder, tokenizer, monkeypatch):
    first = pack(load_text(folder / "verses.txt"), tokenizer, BLOCK)
    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", lambda *_, **__: pytest.fail("tokenized again"))
    again = pack(load_text(folder / "verses.txt"), tokenizer, BLOCK)
    assert again.cache_files == first.cache_files
    assert first.cache_files


@pytest.mark.slow
def test_packed_stream_resumes(folder, tokenizer):
    def blocks():
        return pack(load_text(folder / "verses.txt", streaming=True), tokenizer, BLOCK)

    stopped = blocks()
    list(itertools.islice(stopped, 10))
    resumed = blocks()
    resumed.load_state_dict(stopped.state_dict())
    assert list(resumed) == list(blocks())[10:]


def test_pack_ends_a_document_once(tokenizer):
    bpe = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    bpe.post_processor = processors.TemplateProcessing(single="$0 <|end|>", special_tokens=[("<|end|>", 0)])
    closing = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>")
    endless = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    texts = Dataset.from_dict({"body": ["a", "", "b", None, "c"], "text": [1, 2, 3, 4, 5]})
    a, b, c = (tokenizer(x)["input_ids"][0] for x in "abc")
    assert flat(pack(texts, tokenizer, 2, column="body")) == [a, 0, b, 0, c, 0]
    assert flat(pack(texts, closing, 2, column="body")) == [a, 0, b, 0, c, 0]
    assert flat(pack(texts, endless, 3, column="body")) == [a, b, c]


def test_pack_says_what_is_wrong(tokenizer):
    texts = Dataset.from_dict({"body": ["a", "b"]})
    with pytest.raises(NotHFError, match="the text has fewer tokens than one block of 5"):
        pack(texts, tokenizer, 5, column="body")
    with pytest.raises(NotHFError, match="block_length must be at least 2, got 1"):
        pack(texts, tokenizer, 1, column="body")
    for dataset in (texts, IterableDataset.from_generator(lambda: iter([{"body": "a"}]))):
        with pytest.raises(NotHFError, match="the dataset has no column 'text'; choose one of 'body'"):
            pack(dataset, tokenizer, 2)


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_plain_trainer_trains_on_blocks(folder, tokenizer, tmp_path, streaming):
    blocks = pack(load_text(folder / "verses.txt", streaming=streaming), tokenizer, BLOCK)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=BLOCK, n_embd=16, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0
    )
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], save_strategy="no", use_cpu=True
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # upstream's, about pinned memory
        result = Trainer(GPT2LMHeadModel(config), arguments, train_dataset=blocks).train()
    assert 0 < result.training_loss < 2 * torch.tensor(float(len(tokenizer))).log()
