"""The card of a merged model: a plain transformers model that says what it was made of."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from huggingface_hub import HfApi, ModelCard
from transformers import AutoTokenizer, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from local_hub import Hub
from not_hf import (
    DonorModel,
    TransplantedForCausalLM,
    TransplantedForImageTextToText,
    TransplantedForMaskedLM,
    TransplantedForQuestionAnswering,
    TransplantedForSequenceClassification,
    TransplantedForTokenClassification,
    TransplantedModel,
)
from not_hf.cards import common as readme
from not_hf.cards.merged import merged_card
from testing.commands import done, failed
from testing.donors import tiny_organ
from testing.models import tiny_model
from testing.processes import run_python

TAGS = ["merge", "neural-organ-transplantation", "arxiv:2601.13580"]


@pytest.fixture(scope="module")
def recipient(hub: Hub, base_folder) -> str:
    """A tiny llama on the Hub that is under a licence."""
    repo = HfApi().create_repo("me/merge-base").repo_id
    HfApi().upload_folder(repo_id=repo, folder_path=base_folder("llama"))
    HfApi().upload_file(repo_id=repo, path_in_repo="README.md", path_or_fileobj=b"---\nlicense: mit\n---\n")
    return repo


@pytest.fixture(scope="module")
def organ(recipient: str) -> str:
    """Layers 1 and 2 of it, on the Hub."""
    donor = DonorModel.from_base(recipient, layers=(1, 3))
    donor.config.datasets = ["me/kjv", "verses.txt"]
    donor.push_to_hub("me/merge-organ")
    return "me/merge-organ"


def commit(repo: str) -> str:
    return HfApi().model_info(repo).sha


def rows(card: ModelCard) -> list[str]:
    return re.findall(r"^\| .* \|$", card.text, re.MULTILINE)


@pytest.mark.slow
def test_merge_writes_a_card(recipient, organ, tmp_path):
    out = tmp_path / "merged"
    done("merge", organ, "-o", out)
    card = ModelCard.load(out / "README.md")
    card.validate()
    assert str(ModelCard(str(card))) == str(card)
    assert card.data.to_dict() == {
        "base_model": [recipient, organ],
        "datasets": ["me/kjv"],
        "library_name": "transformers",
        "license": "mit",
        "pipeline_tag": "text-generation",
        "tags": TAGS,
        "base_model_relation": "merge",
    }
    assert "# merge-base-merged" in card.text
    linked = "[me/{0}](https://huggingface.co/me/{0})"
    assert f"| Recipient | {linked.format('merge-base')} at `{commit(recipient)}` |" in rows(card)
    assert "| Layers | 6; the recipient has 4 |" in rows(card)
    organ_row = f"| default | {linked.format('merge-organ')} | `{commit(organ)}` | `[1, 3)` of "
    assert organ_row + f"{linked.format('merge-base')} | 3 | `insert` |" in rows(card)
    assert not re.search(r"\n{3,}|[{%]%|%}|\bNone\b", card.text)
    (snippet,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    code = f"import sys; sys.modules['not_hf'] = None\n{snippet}"  # it needs no not_hf
    shown = run_python("-c", code, cwd=out)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("In the beginning")


def test_the_commit_is_the_one_that_was_loaded(recipient, organ, tmp_path):
    first = commit(organ)
    HfApi().upload_file(repo_id=organ, path_in_repo="NOTES.md", path_or_fileobj=b"later")
    model = TransplantedForCausalLM.from_pretrained(recipient, organ, donor_revision=first, position=0, mode="replace")
    text = merged_card(model, tmp_path).text
    assert f"`{first}`" in text and commit(organ) not in text
    assert "| 0 | `replace` |" in text and "| Layers | 4; the recipient has 4 |" in text


def test_the_card_of_an_encoder_fills_masks(tmp_path):
    model = TransplantedForMaskedLM.from_pretrained(tiny_model("bert"), tiny_organ(1, "bert"))
    assert 'pipeline("fill-mask", model=model)\nprint(pipe(f"In the {pipe' in merged_card(model, tmp_path).text


@pytest.mark.slow
def test_what_is_not_on_the_hub_is_left_out_with_a_warning(recipient, organ, base_folder, tmp_path, caplog):
    readme.warn_once.cache_clear()
    folder = tmp_path / "organ"
    DonorModel.from_pretrained(organ).save_pretrained(folder)
    local_organ = merged_card(TransplantedForCausalLM.from_pretrained(recipient, folder), tmp_path / "out")
    assert local_organ.data.base_model == [recipient]
    local_base = merged_card(TransplantedForCausalLM.from_pretrained(base_folder("llama"), organ), tmp_path / "out")
    assert local_base.data.base_model == [organ]
    assert local_base.data.license is None  # nobody knows that of the recipient
    neither = merged_card(
        TransplantedForCausalLM.from_pretrained(tiny_model("llama"), DonorModel.from_pretrained(folder)), tmp_path
    )
    assert not {"base_model", "base_model_relation"} & neither.data.to_dict().keys()
    for path in (folder, base_folder("llama")):
        assert (
            len([line for line in caplog.messages if "names no base_model" in line and repr(str(path)) in line]) == 1
        )
    for card in (local_organ, local_base, neither):
        assert str(tmp_path) not in str(card)
        card.validate()


@pytest.mark.slow
def test_several_organs(recipient, organ, tmp_path):
    model = TransplantedForCausalLM.from_pretrained(recipient, organ, donor_name="one")
    law = DonorModel.from_base(recipient, layers=(0, 1), license="cc0-1.0")
    law.push_to_hub("me/merge-law")
    model.load_donor("me/merge-law", "two", position=0)
    model.load_donor(organ, "parked", position=4)
    model.set_donor(["one", "two"])
    card = merged_card(model, tmp_path)
    assert card.data.base_model == [recipient, organ, "me/merge-law"]
    assert card.data.license == ["mit", "cc0-1.0"]
    assert "with 2 *organs* merged into it" in card.text
    assert [row.split(" | ")[0] for row in rows(card)[-2:]] == ["| one", "| two"]  # the active ones

    model.push_to_hub("me/merge-both", selected_donors=["one", "two"])
    done("merge", "me/merge-both", "-o", tmp_path / "both")
    card = ModelCard.load(tmp_path / "both" / "README.md")
    assert card.data.base_model == [recipient, "me/merge-both"]
    assert card.text.count(f"`{commit('me/merge-both')}`") == 2


def test_a_card_that_is_there_is_updated(organ, tmp_path):
    readme = tmp_path / "README.md"
    DonorModel.from_pretrained(organ).save_pretrained(tmp_path)  # a donor's card, of all things
    (tmp_path / "config.json").unlink()
    readme.write_text(readme.read_text().replace("- not-hf", "- bible\n- not-hf") + "\nBy hand.\n")
    done("merge", organ, "-o", tmp_path, "--force")
    card = ModelCard.load(readme)
    assert "By hand." in card.text and "## How it was made" in card.text and "## What it is" not in card.text
    assert "# merge-base-merged" in card.text and "check_compatibility" not in card.text
    assert card.data.library_name == "transformers"
    assert card.data.tags == ["bible", *TAGS[1:], "merge"]  # neither a donor's nor an adapter's


def test_a_broken_card_stops_the_merge_before_anything_is_written(organ, tmp_path):
    (tmp_path / "README.md").write_text("---\na: [\n---\n")
    assert "metadata that cannot be read" in failed("merge", organ, "-o", tmp_path, "--force")
    assert [Path(file).name for file in tmp_path.iterdir()] == ["README.md"]


HEADS = {
    "text-classification": TransplantedForSequenceClassification,
    "token-classification": TransplantedForTokenClassification,
    "question-answering": TransplantedForQuestionAnswering,
    "feature-extraction": TransplantedModel,
}


@pytest.mark.parametrize("task", HEADS)
def test_the_card_names_the_task_and_code_of_the_head(task, base_folder, tmp_path, monkeypatch):
    donor = DonorModel.from_base(base_folder("llama"), (1, 3))
    model = HEADS[task].from_pretrained(base_folder("llama"), donor, num_labels=2)
    card = merged_card(model, tmp_path)
    assert card.data.pipeline_tag == task
    model.merge_and_unload().save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(base_folder("llama")).save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1], names := {})
    found = names["pipe"].model if "pipe" in names else names["model"]
    assert found.config.num_hidden_layers == 6 and type(found).__name__ == type(model).__name__


def test_the_card_of_a_vision_language_model_names_its_class(tmp_path):
    shape = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
    text = LlamaConfig(vocab_size=9, num_hidden_layers=4, **shape)
    vision = CLIPVisionConfig(num_hidden_layers=2, image_size=4, patch_size=2, **shape)
    base = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=8))
    model = TransplantedForImageTextToText.from_pretrained(base, DonorModel.from_base(base, (1, 3)))
    card = merged_card(model, tmp_path)
    assert card.data.pipeline_tag == "image-text-to-text"
    assert 'model = AutoModelForImageTextToText.from_pretrained(".")' in card.text and "pipeline(" not in card.text
