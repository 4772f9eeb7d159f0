"""A donor's card: its metadata survives YAML, its text says what is known, people's edits are kept."""

import ast
import logging
import math
import re
from pathlib import Path

import pytest
from architectures import NUM_LAYERS, tiny_model, tiny_tokenizer
from huggingface_hub import ModelCard
from transformers import GPT2Config

from not_hf import card as card_module
from not_hf.card import donor_card, write_card
from not_hf.config import DonorConfig
from not_hf.donor import DonorModel
from not_hf.errors import NotHFError

METRICS = {
    "domain_perplexity": {"before": 24.0, "after": 18.0},
    "control_perplexity": {"before": 30.0, "after": 30.3},
    "training": {"final": {"loss": 1.5}},
}


def make_config(**changes) -> DonorConfig:
    values = {
        "base_model_name_or_path": "openai-community/gpt2",
        "base_revision": "607a30d783dfa663caf39e06633721c8d4cfcd7e",
        "layers": [4, 7],
        "position": 3,
        "base_config": GPT2Config().to_dict(),  # 12 layers, which gpt2 calls n_layer
        "domain": "King James English",
        "datasets": ["me/kjv", "data/kjv.jsonl"],
        "tokens_seen": 1_234_567,
        "metrics": METRICS,
    }
    return DonorConfig(**{**values, **changes})


def python_blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_metadata_survives_yaml():
    card = donor_card(make_config(), 21_261_312, 85_056_000, "me/gpt2-kjv")
    again = ModelCard(str(card)).data
    assert again.to_dict() == card.data.to_dict()
    assert str(ModelCard(str(card))) == str(card)
    assert again.library_name == "not_hf"
    assert again.pipeline_tag == "text-generation"
    assert again.base_model == "openai-community/gpt2"
    assert again.base_model_relation == "adapter"
    assert again.datasets == ["me/kjv"]  # a file is not a dataset on the Hub
    adapter_of = "base_model:adapter:openai-community/gpt2"
    assert set(again.tags) == {"not-hf", "neural-organ-transplantation", "arxiv:2601.13580", adapter_of}


def test_model_index_holds_what_was_measured():
    data = donor_card(make_config(), repo_id="me/gpt2-kjv").data
    (index,) = data.to_dict()["model-index"]
    assert index["name"] == "gpt2-kjv"
    found = {
        (result["dataset"]["name"], metric["type"], metric["value"])
        for result in index["results"]
        for metric in result["metrics"]
    }
    assert found == {
        ("King James English", "perplexity", 18.0),
        ("control", "perplexity", 30.3),
        ("evaluation", "training_final_loss", 1.5),
    }


@pytest.mark.parametrize("metrics", [None, {}, {"note": "none yet", "ok": True}])
def test_without_numbers_there_is_no_model_index(metrics):
    card = donor_card(make_config(metrics=metrics))
    assert "model-index" not in card.data.to_dict()
    assert "Nothing was measured yet." in card.text


def test_a_number_that_is_not_finite_is_shown_but_not_indexed():
    card = donor_card(make_config(metrics={"domain_perplexity": {"before": 24.0, "after": math.inf}}))
    assert "| domain perplexity | 24 | inf |" in card.text
    assert "model-index" not in card.data.to_dict()


def test_text_says_what_is_known():
    text = donor_card(make_config(), 21_261_312, 85_056_000, "me/gpt2-kjv").text
    for row in (
        "| Layers | `[4, 7)` of the base: 3 layers, counted from 0 |",
        "| Position | 3, counted in the recipient's own layers |",
        "| Mode | `insert` |",
        "| Started as | the layers as cut |",
        "| Parameters | 21,261,312 |",
        "| Size | 85.1 MB |",
        "| Training data | me/kjv, data/kjv.jsonl |",
        "| Training tokens | 1,234,567 |",
        "| domain perplexity | 24 | 18 | -25.0 % |",
        "| control perplexity | 30 | 30.3 | +1.0 % |",
    ):
        assert row in text
    assert not re.search(r"\n{3,}|[{%]%|%}|\bNone\b", text)


def test_what_is_not_known_has_no_row():
    text = donor_card(make_config(domain=None, datasets=None, tokens_seen=None, base_revision=None)).text
    assert not re.search(r"\| (Parameters|Size|Domain|Training data|Training tokens|Base revision) \|", text)


def boxes(config: DonorConfig) -> list[str]:
    """The lines inside the drawn stack."""
    picture = re.search(r"```text\n(.*?)```", donor_card(config).text, re.DOTALL)
    assert picture is not None
    lines = picture.group(1).splitlines()
    assert len({len(line) for line in lines[1:-1]}) == 1, "the frame is not straight"
    return [line.strip("│ ") for line in lines if line.startswith("│")]


@pytest.mark.parametrize(
    ("position", "mode", "expected"),
    [
        (
            3,
            "insert",
            ["recipient layers 0 … 2", "ORGAN: layers 4 … 6 of the base", "recipient layers 3 … 11"],
        ),
        (0, "insert", ["ORGAN: layers 4 … 6 of the base", "recipient layers 0 … 11"]),
        (12, "insert", ["recipient layers 0 … 11", "ORGAN: layers 4 … 6 of the base"]),
        (
            1,
            "replace",
            [
                "recipient layers 0",
                "ORGAN: layers 4 … 6 of the base, instead of 1 … 3",
                "recipient layers 4 … 11",
            ],
        ),
        (9, "replace", ["recipient layers 0 … 8", "ORGAN: layers 4 … 6 of the base, instead of 9 … 11"]),
    ],
)
def test_picture(position, mode, expected):
    assert boxes(make_config(position=position, mode=mode)) == expected


def test_no_picture_for_a_position_the_base_does_not_have():
    assert "```text" not in donor_card(make_config(position=13)).text


def test_snippets_are_python_and_name_the_repo():
    blocks = python_blocks(donor_card(make_config(), repo_id="me/gpt2-kjv").text)
    assert len(blocks) == 2
    for block in blocks:
        ast.parse(block)
        assert '"me/gpt2-kjv"' in block
    assert "import not_hf" in blocks[0]
    assert 'from_pretrained("openai-community/gpt2", "me/gpt2-kjv")' in blocks[1]


def test_without_a_repo_the_snippets_run_in_the_folder():
    first, _ = python_blocks(donor_card(make_config()).text)
    assert 'donor = "."' in first


def test_local_base_is_named_nowhere_in_the_metadata(tmp_path, caplog):
    card_module._warn_once.cache_clear()
    base = tmp_path / "smol base"
    base.mkdir()
    config = make_config(base_model_name_or_path=str(base), base_revision=None)
    with caplog.at_level(logging.WARNING, logger="not_hf"):
        card = donor_card(config, repo_id="me/organ")
        donor_card(config)
    assert [record.message for record in caplog.records if "names no base_model" in record.message] == [
        caplog.messages[0]
    ]
    data = card.data.to_dict()
    assert "base_model" not in data and "base_model_relation" not in data
    assert not any(tag.startswith("base_model:") for tag in data["tags"])
    assert str(tmp_path) not in str(card)  # a path says who you are, and helps nobody
    assert 'from_pretrained("path/to/smol base", "me/organ")' in card.text
    for block in python_blocks(card.text):
        ast.parse(block)


def test_a_folder_named_like_a_hub_id_is_local(tmp_path, monkeypatch):
    (tmp_path / "me" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert donor_card(make_config(base_model_name_or_path="me/base")).data.base_model is None


def test_free_text_breaks_neither_the_table_nor_the_template():
    text = donor_card(make_config(domain="law | {{ title }}\n# not a heading")).text
    assert "| Domain | law \\| {{ title }} # not a heading |" in text


def test_composition_lists_its_organs():
    donors = [
        {"name": "kjv", "subfolder": "kjv", "position": 4, "mode": "insert", "scale": 1.0},
        {"name": "law", "donor": "me/law", "revision": "v1", "position": 9, "mode": "replace", "scale": 1.0},
        {
            "name": "off",
            "donor": "me/a",
            "subfolder": "b",
            "position": 0,
            "mode": "insert",
            "scale": 1,
            "active": False,
        },
    ]
    text = donor_card(make_config(layers=None, position=None, donors=donors, metrics=None)).text
    assert "| kjv | kjv | 4 | insert | 1.0 |" in text
    assert "| law | [me/law at v1](https://huggingface.co/me/law/tree/v1) | 9 | replace | 1.0 |" in text
    assert "| off (inactive) | [me/a at main](https://huggingface.co/me/a/tree/main/b) | 0 | insert | 1 |" in text
    assert "```text" not in text


def test_writing_twice_changes_nothing(tmp_path):
    write_card(tmp_path, make_config(), 10, 20, "me/gpt2-kjv")
    first = Path(tmp_path, "README.md").read_bytes()
    write_card(tmp_path, make_config(), 10, 20, "me/gpt2-kjv")
    assert Path(tmp_path, "README.md").read_bytes() == first


HAND_WRITTEN = """---
license: cc0-1.0
language: en
tags:
- bible
- base_model:adapter:me/old-base
base_model: me/old-base
datasets: me/other
model-index:
- name: my name
  results:
  - task:
      type: text-generation
    dataset:
      name: LAMBADA
      type: lambada
    metrics:
    - type: accuracy
      value: 0.4
---

# My organ

Written by hand: <b>keep</b> me.
"""


def test_existing_card_keeps_its_text_and_metadata(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(HAND_WRITTEN, encoding="utf-8")
    for value in (19.0, 18.0):  # the second save replaces the first one's number
        write_card(tmp_path, make_config(metrics={"domain_perplexity": {"before": 24.0, "after": value}}))
    card = ModelCard.load(readme)
    assert card.text == ModelCard(HAND_WRITTEN).text
    assert card.data.license == "cc0-1.0"
    assert card.data.language == "en"
    assert card.data.base_model == "openai-community/gpt2"
    assert card.data.datasets == ["me/other", "me/kjv"]
    assert card.data.tags[0] == "bible" and "not-hf" in card.data.tags
    assert [tag for tag in card.data.tags if tag.startswith("base_model:")] == [
        "base_model:adapter:openai-community/gpt2"
    ]
    assert card.data.model_name == "my name"
    assert [(result.dataset_name, result.metric_value) for result in card.data.eval_results] == [
        ("LAMBADA", 0.4),
        ("King James English", 18.0),
    ]


def test_existing_text_without_metadata_is_kept(tmp_path):
    (tmp_path / "README.md").write_text("# Mine\n\nText.\n", encoding="utf-8")
    write_card(tmp_path, make_config())
    card = ModelCard.load(tmp_path / "README.md")
    assert card.text.strip() == "# Mine\n\nText."
    assert card.data.library_name == "not_hf"


def test_only_the_facts_of_our_own_card_are_rewritten(tmp_path):
    readme = tmp_path / "README.md"
    write_card(tmp_path, make_config(metrics=None, tokens_seen=10))
    edited = readme.read_text(encoding="utf-8").replace("# gpt2-organ", "# A better title").replace("In the", "At the")
    readme.write_text(edited, encoding="utf-8")
    write_card(tmp_path, make_config(tokens_seen=20))
    text = readme.read_text(encoding="utf-8")
    assert "# A better title" in text and "At the beginning" in text
    assert "| Training tokens | 20 |" in text and "| Training tokens | 10 |" not in text
    assert "| domain perplexity | 24 | 18 | -25.0 % |" in text


@pytest.mark.parametrize("metadata", ["[1, 2]", "a: [", "model-index: [{}]"])
def test_unreadable_metadata_is_refused_and_left_alone(tmp_path, metadata):
    readme = tmp_path / "README.md"
    readme.write_text(f"---\n{metadata}\n---\ntext\n", encoding="utf-8")
    with pytest.raises(NotHFError, match="metadata that cannot be read") as caught:
        write_card(tmp_path, make_config())
    assert "\n" not in str(caught.value)
    assert readme.read_text(encoding="utf-8") == f"---\n{metadata}\n---\ntext\n"


def test_snippets_of_a_saved_organ_run(tmp_path, monkeypatch, capsys):
    base = tmp_path / "base"
    tiny_model("llama").save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    DonorModel.from_base(base, layers=(1, 3)).save_pretrained(tmp_path / "organ")
    monkeypatch.chdir(tmp_path / "organ")
    recipient, by_itself = python_blocks(Path("README.md").read_text(encoding="utf-8"))
    for code in (recipient.replace("path/to/base", str(base)), by_itself):
        names: dict = {}
        exec(code, names)
        assert names["model"].config.num_hidden_layers == NUM_LAYERS + 2
    assert "In the beginning" in capsys.readouterr().out
