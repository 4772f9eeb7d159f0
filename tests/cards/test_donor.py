"""A donor's card: its metadata survives YAML, its text says what is known, people's edits are kept."""

import ast
import logging
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from not_hf.cards import common as readme
from not_hf.cards.donor import donor_card
from not_hf.config import DonorConfig
from not_hf.donor.modeling import DonorModel
from testing.cards import make_config
from testing.models import NUM_LAYERS, tiny_model, tiny_tokenizer


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


NESTED = {
    "perplexity": {
        "kjv": {"before": 24.0, "after": 18.0},
        "law": {"before": 40.0, "after": 30.0},
        "before": {"all": 32.0},
        "after": {"all": 24.0},
    },
    "control_perplexity": 30.3,
    "accuracy": {"hellaswag": {"before": 0.31, "after": 0.3}},
}


def test_numbers_of_several_datasets_however_nested(hub):
    card = donor_card(make_config(metrics=NESTED), repo_id="me/gpt2-kjv")
    for row in (
        "| perplexity kjv | 24 | 18 | -25.0 % |",
        "| perplexity law | 40 | 30 | -25.0 % |",
        "| perplexity all | 32 | 24 | -25.0 % |",
        "| control perplexity | – | 30.3 | – |",
        "| accuracy hellaswag | 0.31 | 0.3 | -3.2 % |",
    ):
        assert row in card.text
    card.validate()
    again = ModelCard(str(card)).data
    assert again.eval_results == card.data.eval_results
    assert [(r.dataset_name, r.metric_type, r.metric_value) for r in again.eval_results] == [
        ("kjv", "perplexity", 18.0),
        ("law", "perplexity", 30.0),
        ("all", "perplexity", 24.0),
        ("control", "perplexity", 30.3),
        ("evaluation", "accuracy_hellaswag", 0.3),
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"base_model_name_or_path": None},
        {"license": "other", "license_name": "house-rules", "license_link": "https://example.com/rules"},
        {"license": ["mit", "cc0-1.0"]},
        {"layers": None, "position": None, "donors": [{"name": "kjv", "subfolder": "kjv"}]},
    ],
)
def test_the_hub_takes_the_card(hub, changes):
    config = make_config(**changes)
    card = donor_card(config, 10, 20, "me/gpt2-kjv")
    card.validate()
    stated = {key: getattr(config, key) for key in ("license", "license_name", "license_link")}
    assert {key: card.data.get(key) for key in stated} == stated


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
    readme.warn_once.cache_clear()
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


def test_snippets_of_a_pushed_organ_run_anywhere(hub, base_repo, tmp_path):
    donor = DonorModel.from_base(base_repo("llama"), layers=(1, 3))
    donor.push_to_hub("me/card-snippets")
    blocks = python_blocks(ModelCard.load("me/card-snippets").text)
    assert len(blocks) == 2
    for block in blocks:
        done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


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
