"""A card that is there is brought up to date: what people wrote into it stays."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import HfApi, ModelCard, hf_hub_download, metadata_load
from typer.testing import CliRunner

from local_hub import Hub
from not_hf import DonorConfig, DonorModel
from not_hf.cards.donor import donor_card, updated_card
from not_hf.cli import app
from not_hf.errors import NotHFError
from testing.cards import make_config
from testing.models import tiny_model


def write(folder: Path, config: DonorConfig, *args) -> str:
    """What saving does to a README; returns its text."""
    updated_card(folder, config, *args).save(folder / "README.md")
    return (folder / "README.md").read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------------- the text


def test_writing_twice_changes_nothing(tmp_path):
    first = write(tmp_path, make_config(), 10, 20, "me/gpt2-kjv")
    assert write(tmp_path, make_config(), 10, 20, "me/gpt2-kjv") == first


def test_what_nobody_edited_speaks_of_the_organ_and_place_of_today(tmp_path):
    before = write(tmp_path, make_config(), 10, 20)
    (tmp_path / "README.md").write_text(f"{before}\nBy hand.\n", encoding="utf-8")
    law = make_config(layers=[0, 1], domain="law", mode="replace", tokens_seen=20)
    text = ModelCard(write(tmp_path, law, 10, 20, "me/law-organ")).text
    assert text == f"{donor_card(law, 10, 20, 'me/law-organ').text}\nBy hand.\n"


def test_what_people_edited_stays_and_the_facts_are_rewritten(tmp_path):
    before = write(tmp_path, make_config(metrics=None, tokens_seen=10))
    edited = before.replace("# gpt2-organ", "# A better title").replace("In the", "At the")
    assert edited.count("| Mode | `insert` |") == 1
    (tmp_path / "README.md").write_text(edited.replace("`insert`", "mine"), encoding="utf-8")
    text = write(tmp_path, make_config(tokens_seen=20), None, None, "me/repo")
    assert "# A better title" in text and "At the beginning" in text and "me/repo" not in text
    assert (
        "| Mode | `insert` |" in text and "| Training tokens | 20 |" in text and "| Training tokens | 10 |" not in text
    )
    assert "| domain perplexity | 24 | 18 | -25.0 % |" in text


def without_blocks(text: str, *names: str) -> str:
    """Without the comments around them."""
    return re.sub(rf"<!-- /?not_hf ({'|'.join(names)})\b.*?-->\n*", "", text)


def test_of_a_card_with_facts_only_the_facts_are_rewritten(tmp_path):
    """As not_hf 0.1.0 wrote them, or when somebody deleted the other comments."""
    names = ("about", "use", "limits")
    old = without_blocks(str(donor_card(make_config(tokens_seen=10))), *names)
    assert re.findall("<!-- /?not_hf (.*?) *(?:-->|:)", old) == ["facts", "facts"]
    (tmp_path / "README.md").write_text(old, encoding="utf-8")
    changed = make_config(tokens_seen=20, position=5, layers=[0, 1])
    text = write(tmp_path, changed, None, None, "me/repo")
    assert "# gpt2-organ" in text and ": 3 decoder layers of" in text and '"me/repo"' not in text
    fresh = str(donor_card(changed))
    assert facts(text) == facts(fresh) != facts(old)
    assert text.replace(facts(text), "") == old.replace(facts(old), "")


def facts(text: str) -> str:
    return text[text.index("<!-- not_hf facts: ") : text.index("<!-- /not_hf facts -->")]


@pytest.mark.parametrize(
    "text", ["# Mine\n\nWritten by hand: <b>keep</b> me.\n", "half a block\n<!-- not_hf facts: -->\n"]
)
def test_a_text_without_our_blocks_stays(tmp_path, text):
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    write(tmp_path, make_config())
    card = ModelCard.load(tmp_path / "README.md")
    assert card.text.strip() == text.strip() and card.data.library_name == "not_hf"


def test_metadata_without_text_gets_ours(tmp_path):
    """As the Hub makes it for a new repo with a licence."""
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8")
    write(tmp_path, make_config())
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "mit" and "# gpt2-organ" in card.text


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_windows_line_ends_stay(tmp_path, mark):
    readme = tmp_path / "README.md"
    text = write(tmp_path, make_config(tokens_seen=10)).replace("# gpt2-organ", "# Mine")
    readme.write_bytes((mark + text).replace("\n", "\r\n").encode())
    write(tmp_path, make_config(tokens_seen=20), None, None, "me/repo")
    written = readme.read_bytes().decode()
    assert "| Training tokens | 20 |" in written and "# Mine" in written and 'donor = "me/repo"' in written
    assert written.count("\n") == written.count("\r\n")
    assert written.startswith("---\r\n") and written.count("library_name:") == 1


# --------------------------------------------------------------------------------------------------- the metadata

HAND_WRITTEN = """---
zeta: 1
license: cc0-1.0
tags:
- bible
- base_model:adapter:me/old-base
base_model: me/old-base
library_name: peft
co2_eq_emissions: {emissions: 2.5, source: a guess}
datasets: me/other
model-index:
- name: my name
  results:
  - task: {type: text-generation}
    dataset: {name: LAMBADA, type: lambada}
    metrics: [{type: accuracy, value: 0.4}]
alpha: [two, 1]
---

# My organ
"""


def test_metadata_is_united(tmp_path):
    (tmp_path / "README.md").write_text(HAND_WRITTEN, encoding="utf-8")
    for value in (19.0, 18.0):  # the second save replaces the first one's number
        metrics = {"domain_perplexity": {"before": 24.0, "after": value}}
        write(tmp_path, make_config(metrics=metrics, license="mit"))
    data = metadata_load(tmp_path / "README.md")
    before = yaml.safe_load(HAND_WRITTEN.split("---")[1])
    assert [key for key in data if key in before and key != "model-index"] == [
        *("zeta", "license", "tags", "base_model", "library_name", "co2_eq_emissions", "datasets", "alpha")
    ]
    assert {key for key in before if data[key] == before[key]} == {"zeta", "license", "co2_eq_emissions", "alpha"}
    assert data["library_name"] == "not_hf"  # it says what the files beside it are
    assert data["base_model"] == "openai-community/gpt2"
    assert data["datasets"] == ["me/other", "me/kjv"]
    assert data["tags"][:2] == ["bible", "not-hf"]
    assert [tag for tag in data["tags"] if "base_model" in tag] == ["base_model:adapter:openai-community/gpt2"]
    (index,) = data["model-index"]
    assert index["name"] == "my name"
    assert [(result["dataset"]["name"], result["metrics"][0]["value"]) for result in index["results"]] == [
        ("LAMBADA", 0.4),
        ("King James English", 18.0),
    ]


def test_numbers_that_no_longer_hold_go_from_the_metadata_too(tmp_path):
    card = updated_card(tmp_path, make_config())
    card.data.eval_results += ModelCard(HAND_WRITTEN).data.eval_results
    card.save(tmp_path / "README.md")
    write(tmp_path, make_config(domain="law", metrics={"domain_perplexity": {"before": 9.0, "after": 8.0}}))
    results = [(r.dataset_name, r.metric_value) for r in ModelCard.load(tmp_path / "README.md").data.eval_results]
    assert results == [("LAMBADA", 0.4), ("law", 8.0)]


@pytest.mark.parametrize("index", [None, "- name: run\n  results: []"])
def test_the_last_number_takes_the_model_index_with_it(tmp_path, index):
    if index:
        (tmp_path / "README.md").write_text(f"---\nmodel-index:\n{index}\n---\nText.\n", encoding="utf-8")
    else:
        write(tmp_path, make_config())
    write(tmp_path, make_config(metrics=None))
    assert not {"model-index", "model_name"} & metadata_load(tmp_path / "README.md").keys()


def test_a_base_without_a_hub_id_leaves_a_hand_written_one(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    text = "---\nbase_model: me/published\ntags: base_model:adapter:me/published\n---\n"
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    write(tmp_path, make_config(base_model_name_or_path=str(base)))
    data = metadata_load(tmp_path / "README.md")
    assert data["base_model"] == "me/published"
    assert data["tags"][:2] == ["base_model:adapter:me/published", "not-hf"]


def test_lists_with_odd_items_are_mended(hub, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("---\ntags: [2024, null, bible]\ndatasets: me/other\n---\n", encoding="utf-8")
    write(tmp_path, make_config())
    card = ModelCard.load(readme)
    assert card.data.tags[:3] == ["2024", "bible", "not-hf"]
    card.validate()


@pytest.mark.parametrize(
    "metadata",
    [
        *("[1, 2]", "a: [", "1: a", "tags: 5", "datasets: {a: b}"),
        *("model-index: [{}]", "model-index: 5", "model-index: [{name: a, results: [{task: [1]}]}]"),
    ],
)
def test_unreadable_metadata_stops_saving_before_anything_is_written(tmp_path, metadata):
    donor = DonorModel.from_base(tiny_model("llama"), layers=(1, 3))
    readme = tmp_path / "README.md"
    readme.write_text(f"---\n{metadata}\n---\ntext\n", encoding="utf-8")
    with pytest.raises(NotHFError, match="metadata that cannot be read") as caught:
        donor.save_pretrained(tmp_path)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [readme]
    assert readme.read_text(encoding="utf-8") == f"---\n{metadata}\n---\ntext\n"


# ----------------------------------------------------------------------------------------------------- on the Hub


def push(folder: Path, repo: str) -> ModelCard:
    result = CliRunner().invoke(app, ["push", str(folder), repo])
    assert result.exit_code == 0, result.stderr
    return published(repo)


def published(repo: str) -> ModelCard:
    return ModelCard.load(hf_hub_download(repo, "README.md"))


def edit(repo: str, **replaced: str) -> None:
    """Write into a card on the Hub, as its author may in the browser."""
    text = Path(hf_hub_download(repo, "README.md")).read_text(encoding="utf-8")
    for old, new in replaced.items():
        assert old in text
        text = text.replace(old, new)
    HfApi().upload_file(repo_id=repo, path_in_repo="README.md", path_or_fileobj=text.encode())


@pytest.fixture
def donor(hub: Hub) -> DonorModel:
    donor = DonorModel.from_base(tiny_model("llama"), layers=(1, 3))
    donor.config.base_model_name_or_path = "me/some-base"
    donor.config.license = "mit"
    return donor


@pytest.mark.parametrize("way", ["model", "folder"])
def test_pushing_again_keeps_what_was_written_on_the_hub(donor, tmp_path, way):
    def pushed() -> ModelCard:
        donor.save_pretrained(tmp_path)
        if way == "folder":
            return push(tmp_path, repo)
        donor.push_to_hub(repo)
        return published(repo)

    repo = f"me/card-twice-{way}"
    pushed()
    edit(repo, **{f"# card-twice-{way}": "# By hand", "- not-hf": "- bible\n- not-hf", "mit": "cc0-1.0"})
    donor.config.tokens_seen = 77
    card = pushed()
    assert "# By hand" in card.text and "| Training tokens | 77 |" in card.text
    assert {"bible", "not-hf"} < set(card.data.tags)
    assert card.data.license == "cc0-1.0"


def test_pushing_a_folder_names_the_repo_in_its_card(donor, tmp_path):
    donor.save_pretrained(tmp_path)
    card = push(tmp_path, "me/card-folder")
    assert "# card-folder" in card.text
    assert card.text.count('"me/card-folder"') == 2 and '"."' not in card.text
    assert "| Size |" in card.text and "| Parameters |" in card.text


@pytest.mark.parametrize("mine", ["# Mine", "# some-base-organ"])
def test_pushing_a_folder_with_a_hand_written_card(donor, tmp_path, mine):
    """Its text wins over that on the Hub; the metadata is that of both."""
    repo = f"me/card-both-{len(mine)}"
    donor.push_to_hub(repo)
    edit(repo, **{"# card-both": "# On the Hub", "- not-hf": "- bible\n- not-hf", "license: mit": "zeta: 1"})
    donor.save_pretrained(tmp_path)
    readme = tmp_path / "README.md"
    text = readme.read_text().replace("- not-hf", "- king\n- not-hf").replace("# some-base-organ", mine)
    readme.write_text(text + "\nBy hand.\n")
    card = push(tmp_path, repo)
    title = mine if mine == "# Mine" else f"# {repo.removeprefix('me/')}\n"
    assert title in card.text and "# On the Hub" not in card.text
    assert "By hand." in card.text and f'"{repo}"' in card.text and '"."' not in card.text
    assert {"bible", "king", "not-hf"} < set(card.data.tags)
    assert card.data.get("zeta") == 1 and card.data.license == "mit"
