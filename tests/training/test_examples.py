"""Training data for the command: text or conversations, with replay."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from not_hf import NotHFError
from not_hf.training.examples import TrainingData, collator, mix_replay
from testing.models import tiny_tokenizer
from testing.training import CHAT_TEMPLATE, chat, losses, made, recipient


@pytest.fixture
def text(tmp_path) -> Path:
    file = tmp_path / "general.txt"
    file.write_text("\n".join(f"w{n + 40} " * 15 for n in range(6)))
    return file


@pytest.fixture
def chats(tmp_path) -> Path:
    file = tmp_path / "chat.jsonl"
    file.write_text("\n".join(json.dumps({"turns": chat(f"w{n + 10}", f"w{n + 20}")}) for n in range(8)))
    return file


def tokenizer() -> Any:
    found = copy.deepcopy(tiny_tokenizer())
    found.chat_template = CHAT_TEMPLATE
    return found


def test_conversations_are_recognized(text, chats, tmp_path):
    assert TrainingData.load(str(text)).column == "text"
    with pytest.raises(NotHFError, match="no column 'text'; choose one of 'turns'"):
        TrainingData.load(str(chats))
    found = TrainingData.load(str(chats), column="turns")
    assert found.is_chat and len(found.examples(tokenizer(), 16)) == 8
    both = tmp_path / "both.jsonl"
    both.write_text(json.dumps({"text": "w3 w4", "messages": chat("w10", "w11")}))
    assert not TrainingData.load(str(both)).is_chat
    renamed = tmp_path / "messages.jsonl"
    renamed.write_text(chats.read_text().replace("turns", "messages"))
    for streaming in (False, True):
        assert TrainingData.load(str(renamed), streaming=streaming).is_chat


@pytest.mark.parametrize(("fraction", "count"), [(0.2, 2), (0.5, 8), (0.01, 1)])
def test_replay_is_a_share_of_all_examples(fraction, count, text, chats):
    domain = TrainingData.load(str(chats), column="turns").examples(tokenizer(), 16)
    replay = TrainingData.load(str(text)).examples(tokenizer(), 16)
    mixed = mix_replay(domain, replay, fraction, seed=0)
    rows = [row["input_ids"] for row in mixed]
    assert rows[:8] == domain["input_ids"][:] and len(rows) == 8 + count
    assert all(row in replay["input_ids"][:] for row in rows[8:])
    assert len({tuple(row) for row in rows[8:]}) == min(count, len(replay))
    assert mix_replay(domain, replay, fraction, seed=0)["input_ids"][:] == rows
    assert len(mix_replay(replay, replay, fraction, seed=0)) > len(replay)  # blocks keep their one length


def test_replay_in_a_stream(text, chats):
    how = {"streaming": True}
    domain = TrainingData.load(str(chats), column="turns", **how).examples(tokenizer(), 16)
    replay = TrainingData.load(str(text), **how).examples(tokenizer(), 16)
    rows = [row["input_ids"] for row in itertools.islice(mix_replay(domain, replay, 0.5, seed=0), 40)]
    assert sum(row[0] == 4 for row in rows) == 8 and len(rows) > 9
    shuffled = mix_replay(domain, replay, 0.5, seed=0).shuffle(seed=0, buffer_size=1)
    general = [row["input_ids"] for row in replay]
    for epoch in range(3):  # each takes the first ones, over and over
        shuffled.set_epoch(epoch)
        taken = [row["input_ids"] for row in shuffled if row["input_ids"][0] != 4]
        assert taken == [general[n % len(general)] for n in range(len(taken))]


@pytest.mark.slow
def test_replay_rows_are_cached(text, chats, tmp_path):
    data = TrainingData.load(str(chats), column="turns").examples(tokenizer(), 16)
    data = mix_replay(data, TrainingData.load(str(text)).examples(tokenizer(), 16), 0.2, seed=0)
    trainer = made(recipient(), tmp_path, data, cache_prefix=True, data_collator=collator(tokenizer(), True))
    trainer.train()
    store = trainer._stack.prefix.store.rows
    assert (len(store), store.hits) == (10, 20) and losses(trainer)[-1] < losses(trainer)[0]
