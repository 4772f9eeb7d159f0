"""A donor's card: its metadata survives YAML, its text says what is known, people's edits are kept."""

import logging
import math
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import LlamaForSequenceClassification

from not_hf import TransplantedForSequenceClassification
from not_hf.cards import common as readme
from not_hf.cards.donor import donor_card
from not_hf.config import DonorConfig
from not_hf.donor.modeling import DonorModel
from testing.cards import make_config, markup
from testing.models import tiny_model, tiny_tokenizer
from testing.processes import run_python
from testing.shapes import NUM_LAYERS


def python_blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_metadata_survives_yaml():
    card = donor_card(make_config(), 21_261_312, 85_056_000, "me/gpt2-kjv")
    again = ModelCard(str(card))
    assert str(again) == str(card)
    adapter_of = "base_model:adapter:openai-community/gpt2"
    assert {key: value for key, value in again.data.to_dict().items() if key != "model-index"} == {
        "library_name": "not_hf",
        "pipeline_tag": "text-generation",
        "base_model": "openai-community/gpt2",
        "base_model_relation": "adapter",
        "datasets": ["me/kjv"],  # a file is not a dataset on the Hub
        "tags": ["not-hf", "neural-organ-transplantation", "arxiv:2601.13580", adapter_of],
    }


NESTED = {
    "domain_perplexity": {"before": 24.0, "after": 18.0},
    "perplexity": {
        "law": {"before": 40.0, "after": 30.0},
        "before": {"all": 32.0},
        "after": {"all": 24.0},
    },
    "control_perplexity": 30.3,
    "accuracy": {"hellaswag": {"before": 0.31, "after": 0.3}},
    "speed": {"before": 5},
    "final_loss": {"before": 2.0, "after": math.inf},
    "note": "not a number",
    "ok": True,
}


def test_numbers_however_nested_are_a_table_and_a_model_index():
    card = donor_card(make_config(metrics=NESTED), repo_id="me/gpt2-kjv")
    assert card.text.split("| ---: |\n")[1].split("\n\n")[0].splitlines() == [
        "| domain perplexity | 24 | 18 | -25.0 % |",
        "| perplexity law | 40 | 30 | -25.0 % |",
        "| perplexity all | 32 | 24 | -25.0 % |",
        "| control perplexity | – | 30.3 | – |",
        "| accuracy hellaswag | 0.31 | 0.3 | -3.2 % |",
        "| speed | 5 | – | – |",
        "| final loss | 2 | inf | +inf % |",
    ]
    (index,) = ModelCard(str(card)).data.to_dict()["model-index"]
    assert index["name"] == "gpt2-kjv"
    assert [
        (result["dataset"]["name"], metric["type"], metric["value"])
        for result in index["results"]
        for metric in result["metrics"]
    ] == [
        ("King James English", "perplexity", 18.0),
        ("law", "perplexity", 30.0),
        ("all", "perplexity", 24.0),
        ("control", "perplexity", 30.3),
        ("evaluation", "accuracy_hellaswag", 0.3),  # infinity is not indexed
    ]


@pytest.mark.parametrize("metrics", [None, {}, {"note": "none yet", "ok": True}])
def test_without_numbers_there_is_no_model_index(metrics):
    card = donor_card(make_config(metrics=metrics))
    assert "model-index" not in card.data.to_dict()
    assert "Nothing was measured yet." in card.text


def test_what_a_probe_found_is_a_section_of_its_own():
    lines = ["Attack by the loss: AUC 0.9 (0.8 – 1.0).", "<b>safe</b> [here](https://example.com)"]
    card = donor_card(make_config(metrics={**NESTED, "privacy": lines}))
    section = card.text.split("\n## Privacy\n")[1].split("\n\nOther attacks")[0]
    assert section.splitlines()[-2:] == [
        "- Attack by the loss: AUC 0.9 (0.8 – 1.0).",
        r"- \<b\>safe\</b\> `[here](https://example.com)`",
    ]
    assert "| domain perplexity | 24 | 18 |" in card.text and "| privacy" not in card.text and not markup(card.text)
    assert "how much was not measured" not in card.text
    bare = donor_card(make_config(metrics={"privacy": lines}))
    assert "Nothing was measured yet." not in bare.text and "model-index" not in bare.data.to_dict()


@pytest.mark.parametrize("privacy", [None, "a sentence", ["one", 2], {"before": 1.0}])
def test_without_findings_the_card_says_that_privacy_was_not_measured(privacy):
    text = donor_card(make_config(metrics={"privacy": privacy})).text
    assert "## Privacy" not in text and "trained on; how much was not measured." in text


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"metrics": NESTED},
        {"base_model_name_or_path": None},
        {"license": "other", "license_name": "house-rules", "license_link": "https://example.com/rules"},
        {"license": ["mit", "cc0-1.0"]},
        {"license": ["mit", "other"], "license_name": "house-rules", "license_link": "https://example.com/rules"},
        {"layers": None, "position": None, "donors": [{"name": "kjv", "subfolder": "kjv"}]},
    ],
)
def test_the_hub_takes_the_card(hub, changes):
    config = make_config(**changes)
    card = donor_card(config, 10, 20, "me/gpt2-kjv")
    card.validate()
    stated = {key: getattr(config, key) for key in ("license", "license_name", "license_link")}
    assert {key: card.data.get(key) for key in stated} == stated


def facts(card: ModelCard) -> dict[str, str]:
    """The rows of the table without a header."""
    table = card.text.split("| | |\n| --- | --- |\n")[1].split("\n\n")[0]
    return dict(row.strip("| ").split(" | ", 1) for row in table.splitlines())


def test_the_table_says_what_is_known_and_nothing_else():
    card = donor_card(make_config(base_subfolder="lm"), 21_261_312, 85_056_000, "me/gpt2-kjv")
    version = make_config().not_hf_version
    assert facts(card) == {
        "Architecture": "gpt2",
        "Layers": "`[4, 7)` of the base: 3 layers, counted from 0",
        "Position": "3, counted in the recipient's own layers",
        "Mode": "`insert`",
        "Started as": "the layers as cut",
        "Parameters": "21,261,312",
        "Size": "85.1 MB",
        "Domain": "King James English",
        "Training data": "me/kjv, data/kjv.jsonl",
        "Training tokens": "1,234,567",
        "Base revision": "`607a30d783dfa663caf39e06633721c8d4cfcd7e`",
        "Base folder": "`lm` in its repo",
        "Cut with": f"not_hf {version}",
    }
    assert not re.search(r"\n{3,}|[{%]%|%}|\bNone\b", card.text)
    bare = donor_card(make_config(domain=None, datasets=None, tokens_seen=None, base_revision=None, metrics=None))
    assert list(facts(bare)) == ["Architecture", "Layers", "Position", "Mode", "Started as", "Cut with"]
    assert not re.search(r"\n{3,}|[{%]%|%}|\bNone\b", bare.text)


def test_free_text_breaks_neither_the_table_nor_the_template():
    card = donor_card(make_config(domain="law | {{ title }}\n# not a heading"))
    assert facts(card)["Domain"] == "law \\| {{ title }} # not a heading"


def boxes(config: DonorConfig) -> list[str] | None:
    """The lines inside the drawn stack."""
    picture = re.search(r"```text\n(.*?)```", donor_card(config).text, re.DOTALL)
    if picture is None:
        return None
    lines = picture.group(1).splitlines()
    assert len({len(line) for line in lines[1:-1]}) == 1, "the frame is not straight"
    return [line.strip("│ ") for line in lines if line.startswith("│")]


ORGAN = "ORGAN: layers 4 … 6 of the base"


@pytest.mark.parametrize(
    ("position", "mode", "expected"),
    [
        (3, "insert", ["recipient layers 0 … 2", ORGAN, "recipient layers 3 … 11"]),
        (0, "insert", [ORGAN, "recipient layers 0 … 11"]),
        (12, "insert", ["recipient layers 0 … 11", ORGAN]),
        (13, "insert", None),  # the base has no such position
        (1, "replace", ["recipient layers 0", f"{ORGAN}, instead of 1 … 3", "recipient layers 4 … 11"]),
        (9, "replace", ["recipient layers 0 … 8", f"{ORGAN}, instead of 9 … 11"]),
    ],
)
def test_picture(position, mode, expected):
    assert boxes(make_config(position=position, mode=mode)) == expected


def test_local_base_is_named_nowhere(tmp_path, monkeypatch, caplog):
    readme.warn_once.cache_clear()
    base = tmp_path / "me" / "smol base"
    base.mkdir(parents=True)
    config = make_config(base_model_name_or_path=str(base), base_revision=None)
    with caplog.at_level(logging.WARNING, logger="not_hf"):
        card = donor_card(config, repo_id="me/organ")
        donor_card(config)
    (message,) = caplog.messages
    assert "names no base_model" in message
    data = card.data.to_dict()
    assert "base_model" not in data and "base_model_relation" not in data
    assert not any(tag.startswith("base_model:") for tag in data["tags"])
    assert str(tmp_path) not in str(card)  # a path is private, and helps nobody
    assert 'from_pretrained("path/to/smol base", "me/organ")' in card.text
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me" / "base").mkdir()
    caplog.clear()
    assert donor_card(make_config(base_model_name_or_path="me/base")).data.base_model is None  # a folder, not the repo
    assert "'me/base' is a folder here, " in caplog.text and "give the folder as './me/base'" in caplog.text
    monkeypatch.chdir(tmp_path / "me")
    assert donor_card(make_config(base_model_name_or_path="./me/base")).data.base_model is None


def test_composition_lists_its_organs():
    insert = {"position": 0, "mode": "insert", "scale": 1.0}
    donors = [
        {"name": "kjv", "subfolder": "kjv", **insert},
        {"name": "law", "donor": "me/law", "revision": "v1", **insert, "position": 9, "mode": "replace", "scale": 0.5},
        {"name": "off", "donor": "me/a", "subfolder": "b", **insert, "active": False},
    ]
    text = donor_card(make_config(layers=None, position=None, donors=donors, metrics=None)).text
    assert "| kjv | kjv | 0 | insert | 1.0 |" in text
    assert "| law | [me/law at v1](https://huggingface.co/me/law/tree/v1) | 9 | replace | 0.5 |" in text
    assert "| off (inactive) | [me/a at main](https://huggingface.co/me/a/tree/main/b) | 0 | insert | 1.0 |" in text
    assert "```text" not in text


@pytest.mark.slow
def test_snippets_of_a_pushed_organ_run_anywhere(hub, base_repo, tmp_path, monkeypatch):
    donor = DonorModel.from_base(base_repo("llama"), layers=(1, 3))
    donor.push_to_hub("me/card-snippets")
    by_itself, recipient = python_blocks(ModelCard.load("me/card-snippets").text)
    done = run_python("-c", by_itself, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("In the beginning")
    monkeypatch.chdir(tmp_path)
    exec(recipient, names := {})
    assert names["native"].config.num_hidden_layers == NUM_LAYERS + 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_snippets_of_a_saved_organ_run(tmp_path, monkeypatch, capsys):
    base = tmp_path / "base"
    tiny_model("llama").save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    DonorModel.from_base(base, layers=(1, 3)).save_pretrained(tmp_path / "organ")
    monkeypatch.chdir(tmp_path / "organ")
    recipient, by_itself = python_blocks(Path("README.md").read_text(encoding="utf-8"))
    for code in (recipient.replace("path/to/base", str(base)), by_itself):
        exec(code, names := {})
        assert names["model"].config.num_hidden_layers == NUM_LAYERS + 2
    assert "In the beginning" in capsys.readouterr().out


def test_snippets_of_an_organ_with_a_classifier_run(tmp_path, monkeypatch, capsys):
    base = tmp_path / "base"
    tiny_model("llama").save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    donor = DonorModel.from_base(base, layers=(1, 3))
    chosen = {"modules_to_save": ["score"], "id2label": {0: "law", 1: "kjv"}, "label2id": {"law": 0, "kjv": 1}}
    model = TransplantedForSequenceClassification.from_pretrained(base, donor, is_trainable=True, **chosen)
    model.save_pretrained(tmp_path / "organ")
    card = ModelCard.load(tmp_path / "organ" / "README.md")
    assert card.data.pipeline_tag is None and "`TokenClassification`" in card.text  # which of the two is not recorded
    monkeypatch.chdir(tmp_path / "organ")
    recipient, by_itself = python_blocks(card.text)
    for code in (recipient.replace("path/to/base", str(base)), by_itself):
        exec(code, names := {})
        assert isinstance(names["model"], LlamaForSequenceClassification)
        assert torch.equal(names["model"].score.weight, model.score.weight)
    assert "'label': " in capsys.readouterr().out


def test_the_card_of_an_organ_that_answers_questions_names_that_head():
    card = donor_card(make_config(modules_to_save=["qa_outputs"], labels=["LABEL_0", "LABEL_1"]), repo_id="me/organ")
    assert card.data.pipeline_tag == "question-answering" and "pipeline(" not in card.text
    assert "import AutoModelForQuestionAnswering\n" in card.text and "TransplantedForQuestionAnswering" in card.text
    assert donor_card(make_config(modules_to_save=["norm"], labels=["LABEL_0"])).data.pipeline_tag == "text-generation"
