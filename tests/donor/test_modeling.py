"""A donor is a model of its own: built from its config, run alone, saved."""

from __future__ import annotations

import copy

import pytest
import torch
from huggingface_hub import HfApi

from not_hf import (
    CorruptDonorError,
    DonorModel,
    NotHFError,
    TransplantedForCausalLM,
)
from testing.donors import same, tiny_organ
from testing.models import tiny_model

A, B = tiny_organ(1, layers=(1, 2)), tiny_organ(2, layers=(0, 2))


def test_an_organ_grows_out_of_its_config_alone(token_ids):
    """`DonorModel(config)` is a fresh, untrained organ, as for any model of transformers."""
    fresh = DonorModel(copy.deepcopy(A.config))
    assert fresh.state_dict().keys() == A.state_dict().keys()
    assert fresh(inputs_embeds=torch.randn(1, 3, 32)).last_hidden_state.shape == (1, 3, 32)


def test_an_organ_that_was_run_alone_records_its_states_once(token_ids):
    donor = copy.deepcopy(A)
    donor(inputs_embeds=torch.randn(1, 3, 32), output_hidden_states=True)
    model = TransplantedForCausalLM.from_pretrained(tiny_model("llama"), donor)
    assert len(model(token_ids, output_hidden_states=True).hidden_states) == 6


def test_an_organ_is_sharded_by_its_own_size_wherever_it_was_cut(tmp_path):
    """Tensors that are mapped from a file of the base do not weigh as much as that file."""
    tiny_model("llama").save_pretrained(tmp_path / "base")
    donor = DonorModel.from_base(tmp_path / "base", (2, 4))
    size = sum(parameter.numel() * parameter.element_size() for parameter in donor.parameters())
    for limit, whole in ((size, True), (size // 2, False)):
        donor.save_pretrained(tmp_path / f"{limit}", max_shard_size=limit)
        assert (tmp_path / f"{limit}" / "model.safetensors").exists() == whole


def test_the_files_have_the_dtype_that_is_asked_for(tmp_path):
    donor = copy.deepcopy(A)
    donor.save_pretrained(tmp_path, dtype="float16")
    again, expected = DonorModel.from_pretrained(tmp_path), copy.deepcopy(A).half()
    assert again.dtype == again.config.dtype == torch.float16 and same(again, expected)
    assert donor.dtype == torch.float32
    written = (tmp_path / "model.safetensors").read_bytes()
    with torch.no_grad():
        next(donor.parameters()).fill_(1e6)
    with pytest.raises(CorruptDonorError, match="with NaN or infinity"):
        donor.save_pretrained(tmp_path, dtype=torch.float16)
    for wrong in ("float17", "save", "int8", 16):
        with pytest.raises(NotHFError, match=f"dtype must be a floating-point one or its name, .*, got {wrong!r}"):
            donor.save_pretrained(tmp_path, dtype=wrong)
    assert (tmp_path / "model.safetensors").read_bytes() == written


def test_a_push_has_the_dtype_that_is_asked_for(hub):
    donor = copy.deepcopy(A)
    donor.push_to_hub("me/half-organ", dtype=torch.float16)
    assert same(DonorModel.from_pretrained("me/half-organ", verify=True), copy.deepcopy(A).half())
    assert donor.dtype == torch.float32
    with pytest.raises(NotHFError, match="dtype must be a floating-point one or its name"):
        donor.push_to_hub("me/no-organ", dtype="float17")
    assert not HfApi().repo_exists("me/no-organ")


def test_an_organ_alone_uses_the_attention_of_its_live_base(token_ids):
    base = tiny_model("llama")
    base.set_attn_implementation("eager")
    donor = DonorModel.from_base(base, (1, 3))
    assert donor.organ.config._attn_implementation == "eager"


def test_what_a_readme_breaks_leaves_the_weights(tmp_path):
    A.save_pretrained(tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "README.md").write_text("---\n: [bad\n---\ntext")
    with pytest.raises(NotHFError, match="has metadata that cannot be read"):
        B.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == weights
