"""What is found out about a donor and a recipient from configs and headers, before weights are downloaded."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file

from not_hf import CorruptDonorError, DonorModel, TransplantedForCausalLM, check_compatibility
from not_hf.composition.check import check_donor
from testing.commands import done, invoke
from testing.models import tiny_model

Q = "organ.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def sound(base_repo, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    DonorModel.from_base(base_repo("llama"), (1, 3)).save_pretrained(folder)
    return folder


@pytest.fixture
def broken(sound, tmp_path) -> Path:
    """A donor with four faults that its headers show."""
    folder = Path(shutil.copytree(sound, tmp_path / "broken"))
    tensors = load_file(folder / "model.safetensors")
    tensors[Q] = torch.ones(3, 3)
    del tensors["organ.layers.1.mlp.up_proj.weight"], tensors["organ.layers.1.input_layernorm.weight"]
    tensors["organ.layers.2.bogus"] = torch.ones(2)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def push(folder: Path, name: str) -> str:
    repo = HfApi().create_repo(name, exist_ok=True).repo_id
    HfApi().upload_folder(repo_id=repo, folder_path=folder)
    return repo


def test_every_fault_and_every_mismatch_is_listed_at_once(broken, hub, tmp_path):
    repo = push(broken, "me/broken")
    tiny_model("llama", hidden_size=64, head_dim=16, num_hidden_layers=2).config.save_pretrained(tmp_path / "other")
    hub.requests.clear()
    problems = check_donor(repo, tmp_path / "other")
    for words in (
        "donor hidden_size 32 does not fit recipient hidden_size 64",
        "donor head_dim 8 does not fit",
        "position 3 of 2",
        "missing organ.layers.1.input_layernorm.weight",
        "missing organ.layers.1.mlp.up_proj.weight",
        "unexpected organ.layers.2.bogus",
        f"{Q} has shape (3, 3), expected (32, 32)",
    ):
        assert sum(words in problem for problem in problems) == 1, (words, problems)
    header = int.from_bytes((broken / "model.safetensors").read_bytes()[:8], "little")
    served = [record for record in hub.requests if record.method == "GET" and record.path.startswith("/lfs/")]
    assert sum(record.bytes for record in served) == 8 + header


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("cut", ["stored", "live"])
def test_a_sound_donor_has_no_problems(model_type, cut, base_repo, tmp_path):
    """In whatever layout its experts are."""
    base = base_repo(model_type) if cut == "stored" else tiny_model(model_type)
    DonorModel.from_base(base, (1, 3)).save_pretrained(tmp_path)
    assert check_donor(tmp_path, base_repo(model_type)) == []


def test_a_header_that_cannot_be_read_is_a_problem_among_others(sound, base_repo, tmp_path):
    folder = Path(shutil.copytree(sound, tmp_path / "truncated"))
    (folder / "model.safetensors").write_bytes(b"\0" * 64)
    (problem,) = check_donor(folder, base_repo("llama"))
    assert "not a whole safetensors file" in problem


def test_a_config_that_contradicts_itself_is_an_error(sound, base_repo, tmp_path):
    folder = Path(shutil.copytree(sound, tmp_path / "liar"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "layers": [0, 9]}))
    with pytest.raises(CorruptDonorError):
        check_donor(folder, base_repo("llama"))


def test_all_organs_of_a_composition_are_checked(sound, base_repo, tmp_path):
    model = TransplantedForCausalLM.from_pretrained(base_repo("llama"), sound, donor_name="one", position=0)
    model.load_donor(sound, "two", position=2, mode="replace")
    model.save_pretrained(tmp_path)
    assert check_donor(tmp_path, base_repo("llama")) == []
    (tmp_path / "two" / "model.safetensors").write_bytes(b"")
    problems = check_donor(tmp_path, tiny_model("llama", hidden_size=64, head_dim=8).config)
    assert sum(problem.startswith("organ 'one': donor hidden_size") for problem in problems) == 1
    assert sum(problem.startswith("organ 'two': donor hidden_size") for problem in problems) == 1
    assert sum("organ 'two'" in problem and "safetensors" in problem for problem in problems) == 1


def test_on_the_command_line(sound, broken, base_repo):
    assert done("check", sound, base_repo("llama"))["compatible"] is True
    result = invoke("check", broken, base_repo("llama"))
    assert result.exit_code == 1 and "4 mismatches" in result.stderr
    assert "missing organ.layers.1.mlp.up_proj.weight" in result.stdout
    found = done("inspect", broken, "--recipient", base_repo("llama"))
    assert found["compatible"] is False and len(found["mismatches"]) == 4
    assert {tensor["name"] for tensor in found["tensors"]} > {Q}


@pytest.mark.slow
def test_inspect_reads_headers_alone(sound, hub):
    repo = push(sound, "me/inspected")
    hub.requests.clear()
    found = done("inspect", repo)
    header = int.from_bytes((sound / "model.safetensors").read_bytes()[:8], "little")
    assert sum(record.bytes for record in hub.requests if record.path.startswith("/lfs/")) == 8 + header
    assert found["num_parameters"] == DonorModel.from_pretrained(sound).num_parameters()


def test_what_a_merge_will_refuse_is_listed():
    """gpt2 with this flag scales attention by the layer's number, which an insertion changes."""
    base = tiny_model("gpt2", scale_attn_by_inverse_layer_idx=True)
    donor = DonorModel.from_base(base, (1, 3))
    with tempfile.TemporaryDirectory() as folder:
        donor.save_pretrained(folder)
        found = check_donor(folder, base, position=0)
        assert found == [] and any("can run but not be merged into a native" in line for line in found.differences)
        found = check_donor(folder, base, position=1, mode="replace")
        assert found == [] and not any("merged" in line for line in found.differences)


def test_sliding_layers_in_the_place_of_full_ones_are_told(tmp_path):
    base = tiny_model("gemma3_text")  # sliding, full, sliding, full
    DonorModel.from_base(base, (0, 1), mode="replace").save_pretrained(tmp_path)
    line = "layer_types of the organ are sliding_attention; in their place the recipient has full_attention"
    assert line in check_donor(tmp_path, base, position=1).differences
    assert line in check_compatibility(tmp_path, base, position=1).differences
    assert line not in check_donor(tmp_path, base, position=2).differences
    assert line not in check_donor(tmp_path, base, position=1, mode="insert").differences


def test_a_check_shows_no_bar_of_weights_that_it_does_not_load(sound, base_repo, capfd, monkeypatch):
    monkeypatch.setattr("transformers.utils.logging._tqdm_active", True)
    assert check_donor(sound, base_repo("llama")) == []
    assert "Loading weights" not in capfd.readouterr().err
    DonorModel.from_pretrained(sound)
    assert "Loading weights" in capfd.readouterr().err  # on again


def test_inspect_shows_a_place_for_each_organ_of_a_composition(sound, base_repo, tmp_path):
    model = TransplantedForCausalLM.from_pretrained(base_repo("llama"), sound, donor_name="one", position=0)
    model.load_donor(sound, "two", position=2, mode="replace")
    model.save_pretrained(tmp_path)
    facts, _, organs = invoke("inspect", tmp_path).stdout.partition("Organs")
    assert not re.search(r"│ (position|mode|init|layers) +│", facts) and "│ parameters" in facts
    assert "insert" in organs and "replace" in organs
