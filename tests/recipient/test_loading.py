"""What a recipient takes in, and what of it is looked at first."""

from __future__ import annotations

import copy
import json
from collections import deque

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
)

from not_hf import (
    CorruptDonorError,
    DonorModel,
    NotHFError,
    TransplantedForCausalLM,
)
from not_hf.architecture.twin import build
from testing.donors import SPAN, tiny_organ
from testing.models import logits, tiny_model

A = tiny_organ(1, layers=(1, 2))


def test_organs_are_copies_on_both_sides(token_ids):
    live = tiny_model("llama")
    donor = DonorModel.from_base(live, (1, 2))
    with torch.no_grad():
        live.model.layers[1].mlp.up_proj.weight.zero_()
    assert donor.stack.layers[0].mlp.up_proj.weight.abs().sum() > 0
    recipient = tiny_model("llama").to(torch.bfloat16)
    model = TransplantedForCausalLM.from_pretrained(recipient, donor)
    assert model is recipient and {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in donor.parameters()} == {torch.float32}
    assert donor.stack.layers[0].self_attn.config is donor.organ.config


@pytest.mark.parametrize("value", [float("nan"), 1e6])
def test_values_that_the_recipients_dtype_cannot_hold_are_refused(value, token_ids):
    donor = copy.deepcopy(A)
    donor.stack.layers[0].mlp.up_proj.weight.data[0, 0] = value
    model = tiny_model("llama").half()
    before = logits(model, token_ids)
    with pytest.raises(CorruptDonorError, match=r"non-finite values in layer 0 mlp.up_proj.weight as torch.float16"):
        TransplantedForCausalLM.from_pretrained(model, donor)
    assert type(model) is LlamaForCausalLM and torch.equal(logits(model, token_ids), before)


def test_values_from_a_file_are_checked_again_in_the_dtypes_they_end_up_in(tmp_path):
    """A file is read in one dtype; where the recipient has others, what was finite need not stay so."""
    donor = copy.deepcopy(A)
    donor.stack.layers[0].mlp.up_proj.weight.data[0, 0] = 1e6
    donor.save_pretrained(tmp_path)
    model = tiny_model("llama").half()
    for layer in model.model.layers:
        layer.self_attn.float()
    with pytest.raises(CorruptDonorError, match=r"non-finite values in layer 0 mlp.up_proj.weight as torch.float16"):
        TransplantedForCausalLM.from_pretrained(model, tmp_path)
    assert type(model) is LlamaForCausalLM


def test_a_load_reads_each_tensor_of_an_organ_once_and_builds_two_twins(tmp_path, monkeypatch):
    """What a load costs beside its layers: base and spliced model on the meta device, one look at each value."""
    tiny_model("llama").save_pretrained(tmp_path / "base")
    DonorModel.from_base(tmp_path / "base", (1, 3)).save_pretrained(tmp_path / "organ")
    twins, read = [], []
    aminmax = torch.aminmax
    monkeypatch.setattr("not_hf.architecture.twin._twins", deque(maxlen=4))
    monkeypatch.setattr(
        "not_hf.architecture.twin.build", lambda make, config: twins.append(config) or build(make, config)
    )
    monkeypatch.setattr(torch, "aminmax", lambda tensor: read.append(tensor) or aminmax(tensor))
    model = TransplantedForCausalLM.from_pretrained(tmp_path / "base", tmp_path / "organ")
    assert sorted(config.num_hidden_layers for config in twins) == [4, 6]
    assert len(read) == sum(1 for layer in model.model.layers[3:5] for _ in layer.parameters())


@pytest.fixture
def remote_code_base(tmp_path):
    """A donor whose base turned into a repo that brings code, and the file which that code would write."""
    tiny_model("llama").save_pretrained(tmp_path / "base")
    DonorModel.from_base(tmp_path / "base", (1, 2)).save_pretrained(tmp_path / "organ")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config |= {"model_type": "foreign", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    proof = tmp_path / "it-ran"
    (tmp_path / "base" / "code.py").write_text(f"open({str(proof)!r}, 'w').close()\nclass C: pass\nclass M: pass\n")
    return tmp_path / "organ", proof


def test_trust_in_one_repos_code_does_not_travel_to_another(remote_code_base):
    donor, proof = remote_code_base
    for load in (
        TransplantedForCausalLM.from_pretrained,
        AutoModelForCausalLM.from_pretrained,
        AutoTokenizer.from_pretrained,
    ):
        with pytest.raises((ValueError, OSError)):
            load(donor, trust_remote_code=True)
    assert not proof.exists()


def test_a_donor_that_names_itself_as_its_base_is_an_error(tmp_path):
    A.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(tmp_path)}))
    for load in (AutoModelForCausalLM.from_pretrained, AutoTokenizer.from_pretrained):
        with pytest.raises(NotHFError, match="is a donor"):
            load(tmp_path)


def test_a_recipient_whose_config_makes_the_organ_compute_otherwise_is_warned_of(caplog):
    """olmo clips queries and keys by what the config says at run time."""
    donor = DonorModel.from_base(tiny_model("olmo", clip_qkv=0.01), (1, 3))
    TransplantedForCausalLM.from_pretrained(tiny_model("olmo"), donor)
    assert "clip_qkv is 0.01, not None" in caplog.text


@pytest.mark.parametrize(("model_type", "key"), [("llama", "attention_dropout"), ("gpt2", "resid_pdrop")])
def test_an_organ_has_the_dropout_that_the_recipient_is_loaded_with(model_type, key, base_folder, tmp_path, caplog):
    tiny_organ(1, model_type).save_pretrained(tmp_path)
    base = base_folder(model_type)
    model = TransplantedForCausalLM.from_pretrained(base, tmp_path, is_trainable=True, **{key: 0.25}).train()
    rates = [
        layer.self_attn.attention_dropout if model_type == "llama" else layer.mlp.dropout.p
        for layer in model.base_model.get_submodule("layers" if model_type == "llama" else "h")
    ]
    assert rates == [0.25] * 6 and not caplog.text


def test_private_keys_of_a_config_are_no_difference(tmp_path, caplog):
    """As the loader of GGUF files leaves them."""
    base = tiny_model("llama")
    base.config._model_name_or_path = "a name out of a file"
    DonorModel.from_base(base, SPAN).save_pretrained(tmp_path)
    TransplantedForCausalLM.from_pretrained(base, tmp_path)
    assert "another config" not in caplog.text


@pytest.mark.parametrize("where", [{"donor_revision": "v1"}, {"donor_subfolder": "law"}])
def test_a_donor_in_memory_is_in_no_repo(where):
    donor = DonorModel.from_base(tiny_model("llama"), (1, 2))
    with pytest.raises(NotHFError, match="has no revision or subfolder; leave them out"):
        TransplantedForCausalLM.from_pretrained(tiny_model("llama"), donor, **where)


def test_a_donor_is_not_read_by_the_config_of_its_base(base_folder, tmp_path):
    donor = DonorModel.from_base(base_folder("llama"), (1, 2))
    donor.save_pretrained(tmp_path)
    native, load = tiny_model("llama").config, TransplantedForCausalLM.from_pretrained
    with pytest.raises(NotHFError, match=r"without a recipient, config is that of the donor .*, got LlamaConfig; "):
        load(tmp_path, config=native)
    assert load(tmp_path, config=donor.config).active_donors == load(base_folder("llama"), tmp_path).active_donors
