"""A card that is there is brought up to date: what people wrote into it stays."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import HfApi, ModelCard, hf_hub_download, metadata_load
from typer.testing import CliRunner

from local_hub import Hub
from not_hf import DonorConfig, DonorModel
from not_hf.cards.donor import donor_card, updated_card
from not_hf.cli import app
from not_hf.errors import NotHFError
from testing.cards import make_config
from testing.models import tiny_model


def write(folder: Path, config: DonorConfig, *args) -> None:
    """What saving does to a README."""
    updated_card(folder, config, *args).save(folder / "README.md")


def test_writing_twice_changes_nothing(tmp_path):
    write(tmp_path, make_config(), 10, 20, "me/gpt2-kjv")
    first = Path(tmp_path, "README.md").read_bytes()
    write(tmp_path, make_config(), 10, 20, "me/gpt2-kjv")
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
        write(tmp_path, make_config(metrics={"domain_perplexity": {"before": 24.0, "after": value}}))
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
    write(tmp_path, make_config())
    card = ModelCard.load(tmp_path / "README.md")
    assert card.text.strip() == "# Mine\n\nText."
    assert card.data.library_name == "not_hf"


def test_only_the_facts_of_our_own_card_are_rewritten(tmp_path):
    readme = tmp_path / "README.md"
    write(tmp_path, make_config(metrics=None, tokens_seen=10))
    edited = readme.read_text(encoding="utf-8").replace("# gpt2-organ", "# A better title").replace("In the", "At the")
    readme.write_text(edited, encoding="utf-8")
    write(tmp_path, make_config(tokens_seen=20))
    text = readme.read_text(encoding="utf-8")
    assert "# A better title" in text and "At the beginning" in text
    assert "| Training tokens | 20 |" in text and "| Training tokens | 10 |" not in text
    assert "| domain perplexity | 24 | 18 | -25.0 % |" in text


@pytest.mark.parametrize(
    "metadata",
    [
        *("[1, 2]", "a: [", "1: a", "tags: 5", "datasets: {a: b}"),
        *("model-index: [{}]", "model-index: 5", "model-index: [{name: a, results: [{task: [1]}]}]"),
    ],
)
def test_unreadable_metadata_is_refused_and_left_alone(tmp_path, metadata):
    readme = tmp_path / "README.md"
    readme.write_text(f"---\n{metadata}\n---\ntext\n", encoding="utf-8")
    with pytest.raises(NotHFError, match="metadata that cannot be read") as caught:
        write(tmp_path, make_config())
    assert "\n" not in str(caught.value)
    assert readme.read_text(encoding="utf-8") == f"---\n{metadata}\n---\ntext\n"


ODD_KEYS = """---
zeta: 1
tags:
- bible
license: cc0-1.0
co2_eq_emissions:
  emissions: 2.5
  source: a guess
library_name: peft
alpha:
- two
- 1
---
# Mine
"""


def test_unknown_keys_and_the_order_of_all_stay(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(ODD_KEYS, encoding="utf-8")
    write(tmp_path, make_config(license="mit"))
    data = metadata_load(readme)
    assert list(data)[:6] == ["zeta", "tags", "license", "co2_eq_emissions", "library_name", "alpha"]
    assert data["zeta"] == 1 and data["alpha"] == ["two", 1]
    assert data["co2_eq_emissions"] == {"emissions": 2.5, "source": "a guess"}
    assert data["license"] == "cc0-1.0"
    assert data["library_name"] == "not_hf"  # it says what the files beside it are


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_windows_line_ends_stay(tmp_path, mark):
    readme = tmp_path / "README.md"
    write(tmp_path, make_config(tokens_seen=10))
    text = readme.read_text(encoding="utf-8").replace("# gpt2-organ", "# Mine")
    readme.write_bytes((mark + text).replace("\n", "\r\n").encode())
    write(tmp_path, make_config(tokens_seen=20))
    written = readme.read_bytes().decode()
    assert "| Training tokens | 20 |" in written and "# Mine" in written
    assert written.count("\n") == written.count("\r\n")
    assert written.startswith("---\r\n") and written.count("library_name:") == 1


def test_a_card_without_our_comments_changes_in_its_metadata_only(tmp_path):
    readme = tmp_path / "README.md"
    write(tmp_path, make_config(metrics=None, tokens_seen=10))
    card = ModelCard.load(readme)
    card.text = card.text.replace("<!-- /not_hf facts -->", "").replace("| Mode | `insert` |", "| Mode | mine |")
    card.save(readme)
    write(tmp_path, make_config(tokens_seen=20))
    again = ModelCard.load(readme)
    assert again.text == card.text
    assert len(again.data.eval_results) == 3


def test_numbers_that_no_longer_hold_go_from_the_metadata_too(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(HAND_WRITTEN, encoding="utf-8")
    write(tmp_path, make_config())
    card = ModelCard.load(readme)
    card.text = donor_card(make_config()).text  # now with the facts that say which numbers are ours
    card.save(readme)
    write(tmp_path, make_config(domain="law", metrics={"domain_perplexity": {"before": 9.0, "after": 8.0}}))
    results = [(r.dataset_name, r.metric_value) for r in ModelCard.load(readme).data.eval_results]
    assert results == [("LAMBADA", 0.4), ("law", 8.0)]

    (own := tmp_path / "own").mkdir()
    write(own, make_config())
    write(own, make_config(metrics=None))
    data = ModelCard.load(own / "README.md").data.to_dict()
    assert "model-index" not in data and "model_name" not in data


def test_a_base_without_a_hub_id_leaves_a_hand_written_one(tmp_path):
    readme, base = tmp_path / "README.md", tmp_path / "base"
    base.mkdir()
    readme.write_text("---\nbase_model: me/published\ntags: base_model:adapter:me/published\n---\n", encoding="utf-8")
    write(tmp_path, make_config(base_model_name_or_path=str(base)))
    data = ModelCard.load(readme).data
    assert data.base_model == "me/published"
    assert data.tags[:2] == ["base_model:adapter:me/published", "not-hf"]


def test_lists_with_odd_items_are_mended(hub, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("---\ntags: [2024, null, bible]\ndatasets: me/other\n---\n", encoding="utf-8")
    write(tmp_path, make_config())
    card = ModelCard.load(readme)
    assert card.data.tags[:3] == ["2024", "bible", "not-hf"]
    card.validate()


def test_a_broken_card_stops_saving_before_anything_is_written(tmp_path):
    donor = DonorModel.from_base(tiny_model("llama"), layers=(1, 3))
    (tmp_path / "README.md").write_text("---\na: [\n---\n")
    with pytest.raises(NotHFError, match="metadata that cannot be read"):
        donor.save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["README.md"]


# -------------------------------------------------------------------------------------------------- on the Hub


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


def test_pushing_again_keeps_what_was_written_on_the_hub(donor):
    donor.push_to_hub("me/card-twice")
    edit("me/card-twice", **{"# card-twice": "# By hand", "- not-hf": "- bible\n- not-hf", "mit": "cc0-1.0"})
    donor.config.tokens_seen = 77
    donor.push_to_hub("me/card-twice")
    card = published("me/card-twice")
    assert "# By hand" in card.text and "| Training tokens | 77 |" in card.text
    assert {"bible", "not-hf"} < set(card.data.tags)
    assert card.data.license == "cc0-1.0"


def test_pushing_a_folder_names_the_repo_in_its_card(donor, tmp_path):
    donor.save_pretrained(tmp_path)
    card = push(tmp_path, "me/card-folder")
    assert "# card-folder" in card.text
    assert card.text.count('"me/card-folder"') == 2 and '"."' not in card.text
    assert "| Size |" in card.text and "| Parameters |" in card.text


def test_pushing_a_folder_keeps_what_was_written_on_the_hub(donor, tmp_path):
    donor.save_pretrained(tmp_path)
    push(tmp_path, "me/card-folder-twice")
    edit("me/card-folder-twice", **{"# card-folder-twice": "# By hand", "- not-hf": "- bible\n- not-hf"})
    donor.config.tokens_seen = 77
    donor.save_pretrained(tmp_path)
    card = push(tmp_path, "me/card-folder-twice")
    assert "# By hand" in card.text and "| Training tokens | 77 |" in card.text
    assert {"bible", "not-hf"} < set(card.data.tags)


def test_pushing_a_folder_with_a_hand_written_card(donor, tmp_path):
    donor.push_to_hub("me/card-both")
    edit("me/card-both", **{"# card-both": "# On the Hub", "- not-hf": "- bible\n- not-hf", "license: mit": "zeta: 1"})
    donor.save_pretrained(tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text(readme.read_text().replace("- not-hf", "- king\n- not-hf") + "\nBy hand.\n")
    card = push(tmp_path, "me/card-both")
    assert "By hand." in card.text and "# card-both" in card.text and '"me/card-both"' in card.text
    assert {"bible", "king", "not-hf"} < set(card.data.tags)
    assert card.data.get("zeta") == 1 and card.data.license == "mit"


def test_a_text_nobody_wrote_into_speaks_of_the_organ_it_lies_beside(base_repo, tmp_path):
    """In a folder and on the Hub; what somebody wrote stays, though it speaks of the old one."""
    first = DonorModel.from_base(base_repo("llama"), (1, 3))
    second = DonorModel.from_base(base_repo("mistral"), (0, 1), domain="law")
    for donor in (first, second):
        donor.save_pretrained(tmp_path)
        donor.push_to_hub("me/reused")
    for text in ((tmp_path / "README.md").read_text(), ModelCard.load("me/reused").content):
        assert "1 decoder layer of [me/tiny-mistral]" in text and "for law" in text and "tiny-llama" not in text
    (tmp_path / "README.md").write_text((tmp_path / "README.md").read_text() + "\nBy hand.\n")
    first.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert (
        "By hand." in text and "1 decoder layer of [me/tiny-mistral]" in text and "base_model: me/tiny-llama" in text
    )


def test_an_empty_model_index_leaves_no_stray_key(tmp_path):
    (tmp_path / "README.md").write_text("---\nmodel-index:\n- name: run\n  results: []\n---\nText.\n")
    write(tmp_path, make_config(metrics=None))
    assert "model_name" not in metadata_load(tmp_path / "README.md")
