"""Compositions are written whole or not at all, by reference or with their organs in subfolders."""

from __future__ import annotations

import shutil

import pytest
import torch
from huggingface_hub import HfApi
from transformers import AutoConfig, AutoTokenizer

from not_hf import (
    CorruptDonorError,
    DonorConfig,
    DonorModel,
    NotHFError,
    OrganSource,
    TransplantedForCausalLM,
    compose,
    push_donor,
)
from not_hf.architecture.differences import config_differences
from testing import tree
from testing.donors import organ
from testing.hub import commit, entries
from testing.models import logits, tiny_model


def test_donors_from_the_hub_are_listed_at_their_commits(base, kjv, law, both):
    assert sorted(path.name for path in both.iterdir()) == ["README.md", "config.json"]
    config = DonorConfig.from_pretrained(both)
    assert (config.base_model_name_or_path, config.base_revision) == (base, commit(base))
    assert config_differences(config.native_config("base_config"), AutoConfig.from_pretrained(base)) == []
    assert config.donors == [
        {
            "name": "c-kjv",
            "donor": kjv,
            "revision": commit(kjv),
            "position": 3,
            "mode": "insert",
            "scale": 1.0,
            "active": True,
        },
        {
            "name": "law",
            "donor": law,
            "revision": commit(law),
            "position": 1,
            "mode": "replace",
            "scale": 1.0,
            "active": True,
        },
    ]
    card = (both / "README.md").read_text()
    link = f"[{law} at {commit(law)}](https://huggingface.co/{law}/tree/{commit(law)})"
    assert f"| law | {link} | 1 | replace | 1.0 |" in card
    assert f"base_model: {base}" in card


@pytest.mark.slow
def test_local_donors_are_copied_in_and_those_from_the_hub_when_asked(base, kjv, law, one_by_one, token_ids, tmp_path):
    DonorModel.from_pretrained(law).save_pretrained(tmp_path / "my.law", max_shard_size="10KB")
    plan = compose([kjv, OrganSource("", tmp_path / "my.law", position=1)], base)
    plan.save_pretrained(tmp_path / "some")
    plan.save_pretrained(tmp_path / "all", embed=True)
    shutil.rmtree(tmp_path / "my.law")
    assert [entry.get("subfolder") for entry in entries(tmp_path / "some")] == [None, "my-law"]
    assert entries(tmp_path / "some")[0]["revision"] == commit(kjv)
    assert [entry.get("subfolder") for entry in entries(tmp_path / "all")] == ["c-kjv", "my-law"]
    assert not any("donor" in entry for entry in entries(tmp_path / "all"))
    assert (tmp_path / "all" / "c-kjv" / "README.md").exists()
    assert len(list((tmp_path / "some" / "my-law").glob("*.safetensors"))) > 1
    for name in ("some", "all"):
        model = TransplantedForCausalLM.from_pretrained(tmp_path / name)
        assert torch.equal(logits(model, token_ids), logits(one_by_one, token_ids))


def test_a_base_on_this_machine_is_named_and_its_tokenizer_copied(base_folder, base, kjv, tmp_path):
    compose([kjv], base_folder("llama")).save_pretrained(tmp_path)
    config = DonorConfig.from_pretrained(tmp_path)
    assert (config.base_model_name_or_path, config.base_revision) == (str(base_folder("llama")), None)
    assert (tmp_path / "tokenizer.json").exists()
    assert AutoTokenizer.from_pretrained(tmp_path)("w5 w6 w7 w8").input_ids == [5, 6, 7, 8]


def test_weights_that_are_missing_or_damaged_are_refused_and_leave_the_folder_as_it_was(base, kjv, law, tmp_path):
    DonorModel.from_pretrained(law).save_pretrained(tmp_path / "law")
    compose([kjv], base).save_pretrained(tmp_path / "out")
    before = tree(tmp_path / "out")
    plan = compose([kjv, tmp_path / "law"], base)
    weights = (tmp_path / "law" / "model.safetensors").read_bytes()
    (tmp_path / "law" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    for folder in (tmp_path / "out", tmp_path / "new"):
        with pytest.raises(CorruptDonorError, match="not a whole safetensors file"):
            plan.save_pretrained(folder)
    (tmp_path / "law" / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(CorruptDonorError, match="law"):
        compose([tmp_path / "law"], base)
    (tmp_path / "law" / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"has no model.safetensors"):
        compose([tmp_path / "law"], base)
    HfApi().create_repo("me/c-hollow")
    HfApi().upload_folder(repo_id="me/c-hollow", folder_path=tmp_path / "law")
    with pytest.raises(OSError, match=r"has no model.safetensors"):
        compose(["me/c-hollow"], base)
    assert tree(tmp_path / "out") == before and not (tmp_path / "new").exists()


def test_a_disk_that_fills_up_leaves_the_folder_as_it_was(base, kjv, tmp_path, monkeypatch):
    plan = compose([kjv], base)
    plan.save_pretrained(tmp_path / "out")
    before = tree(tmp_path / "out")

    def fill_the_disk(source, target):
        raise OSError("No space left on device")

    monkeypatch.setattr(shutil, "copyfile", fill_the_disk)
    for folder in ("out", "new"):
        with pytest.raises(OSError, match="No space left"):
            plan.save_pretrained(tmp_path / folder, embed=True)
    assert tree(tmp_path / "out") == before and not (tmp_path / "new").exists()


def test_another_model_or_a_file_in_the_way_is_refused(base, kjv, tmp_path):
    plan = compose([kjv], base)
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_model("llama").save_pretrained(tmp_path / "out" / "c-kjv")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "c-kjv").write_text("mine")
    before = tree(tmp_path)
    for folder in ("model", "out"):
        with pytest.raises(NotHFError, match="holds a model of type 'llama'"):
            plan.save_pretrained(tmp_path / folder, embed=True)
    for folder in ("file", "taken"):
        with pytest.raises(NotHFError, match="is a file"):
            plan.save_pretrained(tmp_path / folder, embed=True)
    assert tree(tmp_path) == before


def test_written_over_a_donor_its_weights_go_and_its_card_stays(base, kjv, law, tmp_path):
    DonorModel.from_pretrained(law).save_pretrained(tmp_path)
    DonorModel.from_pretrained(kjv).save_pretrained(tmp_path / "c-kjv", max_shard_size="10KB")
    card = (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text(card + "\nWritten by hand.\n")
    (tmp_path / "notes.txt").write_text("mine")
    compose([kjv], base).save_pretrained(tmp_path, embed=True)
    assert sorted(tree(tmp_path)) == [
        "README.md",
        "c-kjv/README.md",
        "c-kjv/config.json",
        "c-kjv/model.safetensors",
        "config.json",
        "notes.txt",
    ]
    card = (tmp_path / "README.md").read_text()
    assert "Written by hand." in card and "| c-kjv | c-kjv | 3 | insert | 1.0 |" in card


def test_the_licence_and_the_sizes_are_known_however_it_was_made(base, tmp_path):
    for seed, name in ((1, "one"), (2, "two")):
        donor = organ(base, seed)
        donor.config.license = "mit"
        donor.save_pretrained(tmp_path / name)
    model = TransplantedForCausalLM.from_pretrained(base, tmp_path / "one", donor_name="one", position=0)
    model.load_donor(tmp_path / "two", "two", position=2)
    model.save_pretrained(tmp_path / "saved")
    compose([tmp_path / "one", tmp_path / "two"]).save_pretrained(tmp_path / "composed")
    rows = []
    for name in ("saved", "composed"):
        assert DonorConfig.from_pretrained(tmp_path / name).license == "mit"
        text = (tmp_path / name / "README.md").read_text()
        assert "license: mit" in text
        rows.append([line for line in text.splitlines() if line.startswith(("| Parameters", "| Size"))])
    assert rows[0] == rows[1] and len(rows[0]) == 2


def test_an_organ_that_was_a_trainers_checkpoint_is_pushed_with_the_others(base, kjv, tmp_path):
    """It is named after its folder, like the checkpoints that a push leaves out."""
    DonorModel.from_pretrained(kjv).save_pretrained(tmp_path / "runs" / "checkpoint-500")
    compose([kjv, OrganSource("", tmp_path / "runs" / "checkpoint-500", position=0)]).save_pretrained(
        tmp_path / "both"
    )
    for other in (tmp_path / "both" / "checkpoint-9", tmp_path / "both" / "checkpoint-500" / "checkpoint-1"):
        other.mkdir()
        (other / "optimizer.pt").write_bytes(b"large")
    push_donor(tmp_path / "both", "me/c-checkpoint", ignore=["check*"])
    assert TransplantedForCausalLM.from_pretrained("me/c-checkpoint").active_donors == ["c-kjv", "checkpoint-500"]
    assert not [file for file in HfApi().list_repo_files("me/c-checkpoint") if "optimizer" in file]
