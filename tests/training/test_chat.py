"""Conversations as examples: the assistant's turns have labels, whatever the template."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerFast

from not_hf import NotHFError, tokenize_chat
from testing.models import tiny_tokenizer
from testing.training import CHAT_TEMPLATE, chat, losses, made, recipient

MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}w5 {% generation %}{{ m.content }} </s>{% endgeneration %} "
    "{% else %}w4 {{ m.content }} </s> {% endif %}{% endfor %}{% if add_generation_prompt %}w5 {% endif %}"
)
# of an assistant's turn, only the last keeps its reasoning, as in Qwen 3
FORGETFUL = (
    "{% for m in messages %}{{ ('w5 w8 ' if m.role == 'assistant' and loop.last else 'w5 ' if m.role == 'assistant' "
    "else 'w4 ') + m.content + ' </s> ' }}{% endfor %}{% if add_generation_prompt %}w5 {% endif %}"
)
STRICT = "{% if messages[0].role != 'user' %}{{ raise_exception('a user begins') }}{% endif %}" + CHAT_TEMPLATE


def tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    found = copy.deepcopy(tiny_tokenizer())
    found.chat_template = template
    return found


def examples(template: str | None, *chats: Any, max_length: int = 32) -> list[tuple[list[int], list[int]]]:
    rows = Dataset.from_list([{"messages": each, "id": n} for n, each in enumerate(chats)])
    found = tokenize_chat(rows, tokenizer(template), max_length)
    assert found.column_names == ["input_ids", "labels"]
    return [(row["input_ids"], row["labels"]) for row in found]


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, MARKED], ids=["plain", "marked"])
def test_only_the_assistant_s_turns_have_labels(template):
    ((ids, labels),) = examples(template, chat("w10 w11", "w12", "w13", "w14 w15"))
    assert ids == [4, 10, 11, 2, 5, 12, 2, 4, 13, 2, 5, 14, 15, 2]
    assert labels == [*[-100] * 5, 12, 2, *[-100] * 4, 14, 15, 2]


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, MARKED], ids=["plain", "marked"])
def test_what_is_too_long_is_cut_off_or_left_out(template, caplog):
    chats = [chat("w10", "w11"), chat("w10 w10 w10 w10 w10 w10", "w11"), [], chat("w10")]
    ((ids, labels),) = examples(template, *chats, max_length=5)
    assert (ids, labels) == ([4, 10, 2, 5, 11], [*[-100] * 4, 11])
    assert "3 of 4 conversations have no turn of the assistant within their first 5 tokens" in caplog.text


def test_fields_that_other_turns_have_are_not_there():
    template = CHAT_TEMPLATE.replace("m.content", "(m.content if m.name is not defined else m.name)")
    turns = [{"role": "user", "content": "w9", "name": "w10"}, {"role": "assistant", "content": "w11"}]
    ((ids, labels),) = examples(template, turns)
    assert ids == [4, 10, 2, 5, 11, 2] and labels == [*[-100] * 4, 11, 2]


def test_arguments_that_other_tool_calls_have_are_not_there():
    call = "{% for c in m.tool_calls or [] %}{{ c.function.arguments.keys() | join(' ') }} </s> {% endfor %}"
    template = CHAT_TEMPLATE.replace("{% endfor %}", call + "{% endfor %}", 1)
    template = template.replace("+ m.content + ' </s> '", "+ (m.content or '') + ' '")
    chats = []
    for name in ("w20", "w21"):
        calls = [{"function": {"name": "w9", "arguments": {name: "w12"}}}]
        chats.append([*chat("w10"), {"role": "assistant", "content": None, "tool_calls": calls}])
    assert [ids for ids, _ in examples(template, *chats)] == [[4, 10, 5, 20, 2], [4, 10, 5, 21, 2]]


def test_templates_that_rewrite_earlier_turns():
    ((ids, labels),) = examples(FORGETFUL, chat("w10", "w11"))
    assert (ids, labels) == ([4, 10, 2, 5, 8, 11, 2], [*[-100] * 4, 8, 11, 2])
    message = r"no \{% generation %\} markers, and renders turn 1 of conversation 1 differently"
    with pytest.raises(NotHFError, match=message):
        examples(FORGETFUL, chat("w10", "w11"), chat("w10", "w11", "w12", "w13"))


def test_an_assistant_that_begins_needs_markers():
    turns = chat("w10", "w11", "w12", first="assistant")
    with pytest.raises(NotHFError, match="turn 0 of conversation 0"):
        examples(CHAT_TEMPLATE, turns)
    ((_, labels),) = examples(MARKED, turns)
    assert [label for label in labels if label != -100] == [10, 2, 12, 2]


@pytest.mark.parametrize(
    ("template", "chats", "message"),
    [
        (None, [chat("w10", "w11")], "has no chat template"),
        (STRICT, [chat("w10", "w11", first="assistant")], "refuses conversation 0: a user begins"),
        (CHAT_TEMPLATE, [chat("w10")], "no conversation has a turn of the assistant"),
    ],
)
def test_what_cannot_be_had_is_refused(template, chats, message):
    with pytest.raises(NotHFError, match=message):
        examples(template, *chats)


def test_a_stream_gives_the_same_examples():
    rows = [{"messages": chat(f"w{n + 10}", f"w{n + 20}"), "id": n} for n in range(4)]
    stream = IterableDataset.from_generator(lambda: iter(rows))
    found = tokenize_chat(stream, tokenizer(CHAT_TEMPLATE), 16)
    assert list(found) == list(tokenize_chat(Dataset.from_list(rows), tokenizer(CHAT_TEMPLATE), 16))


@pytest.mark.slow
def test_conversations_are_cached(tmp_path):
    rows = Dataset.from_list([{"messages": chat(f"w{n + 10}", f"w{n + 20} " * (1 + n % 3))} for n in range(10)])
    data = tokenize_chat(rows, tokenizer(CHAT_TEMPLATE), 16)
    found = []
    for cache in (False, True):
        collator = DataCollatorForSeq2Seq(tokenizer(CHAT_TEMPLATE), pad_to_multiple_of=16)
        collator.tokenizer.padding_side = "right"
        trainer = made(recipient(), tmp_path, data, cache_prefix=cache, data_collator=collator)
        trainer.train()
        found.append(losses(trainer))
    assert found[0] == found[1]
    assert trainer._stack.prefix.store.rows.hits == 2 * 10
    assert torch.isfinite(torch.tensor(found[0])).all()
