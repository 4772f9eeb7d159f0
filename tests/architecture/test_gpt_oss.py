"""GPT-OSS, the paper's largest: MXFP4 experts, attention sinks, sliding and full attention in turn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GptOssForCausalLM

from not_hf import DonorModel, IncompatibleDonorError, TransplantedForCausalLM, check_compatibility
from testing.checkpoints import write_mxfp4
from testing.models import logits, tiny_config, tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_mxfp4(tmp_path_factory.mktemp("mxfp4"))


@pytest.fixture(scope="module")
def native(folder):
    """As transformers dequantizes it."""
    return AutoModelForCausalLM.from_pretrained(folder)


def test_an_organ_has_sinks_experts_and_both_kinds_of_attention(folder, native):
    assert native.config.layer_types == ["sliding_attention", "full_attention"] * 2
    organ = DonorModel.from_base(folder, (1, 3))
    for ours, theirs in zip(organ.stack.layers, native.model.layers[1:3], strict=True):
        assert torch.equal(ours.self_attn.sinks, theirs.self_attn.sinks) and ours.self_attn.sinks.numel() == 4
        assert ours.self_attn.sliding_window == theirs.self_attn.sliding_window
        assert torch.equal(ours.mlp.experts.gate_up_proj, theirs.mlp.experts.gate_up_proj)
        assert torch.equal(ours.mlp.router.weight, theirs.mlp.router.weight)
    assert organ.organ.config.layer_types == ["full_attention", "sliding_attention"]


@pytest.mark.parametrize("position", [0, 1, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 3, 4))])
def test_layer_types_move_with_the_layers_wherever_they_go(position, folder, native, token_ids):
    before = logits(native, token_ids)
    model = AutoModelForCausalLM.from_pretrained(folder)
    donor = DonorModel.from_base(folder, (1, 3))
    assert check_compatibility(donor, model, position=position) == []
    model = TransplantedForCausalLM.from_pretrained(model, donor, position=position)
    types = ["sliding_attention", "full_attention"] * 2
    types[position:position] = ["full_attention", "sliding_attention"]
    assert model.config.layer_types == types
    windows = [layer.self_attn.sliding_window for layer in model.model.layers]
    assert windows == [6 if kind == "sliding_attention" else None for kind in types]
    options = {"attention_mask": torch.ones_like(token_ids), "do_sample": False, "max_new_tokens": 8}
    assert torch.equal(model.generate(token_ids, **options), model.generate(token_ids, use_cache=False, **options))
    with model.disable_donors():
        assert torch.equal(logits(model, token_ids), before)


@pytest.mark.slow
def test_an_organ_starts_as_a_no_op_learns_and_is_merged(folder, native, token_ids, tmp_path):
    donor = DonorModel.from_base(folder, (0, 2), init="identity", position=2)
    model = TransplantedForCausalLM.from_pretrained(folder, donor, is_trainable=True)
    assert torch.equal(logits(model, token_ids), logits(native, token_ids))
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(learning, lr=1.0)
    for _ in range(2):
        model(token_ids, labels=token_ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = logits(model, token_ids)
    assert not torch.equal(after, logits(native, token_ids))
    with model.disable_donors():
        assert torch.equal(logits(model, token_ids), logits(native, token_ids))
    model.save_pretrained(tmp_path / "organ")
    again = TransplantedForCausalLM.from_pretrained(folder, tmp_path / "organ")
    assert torch.equal(logits(again, token_ids), after)
    again.set_donor_scale("default", 0)
    assert torch.equal(logits(again, token_ids), logits(native, token_ids))

    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and len(merged.model.layers) == 6
    assert type(merged) is GptOssForCausalLM
    assert torch.allclose(logits(merged, token_ids), after, atol=2e-2)


def test_experts_of_another_number_work_but_have_no_native_config(folder, token_ids, caplog):
    donor = DonorModel.from_base(folder, (1, 3))
    others = AutoModelForCausalLM.from_config(
        tiny_config("gpt_oss", hidden_size=64, intermediate_size=32, head_dim=16, num_local_experts=8)
    ).to(torch.bfloat16)
    model = TransplantedForCausalLM.from_pretrained(others, donor)
    assert "can run but not be merged" in caplog.text and "num_local_experts is 4, not 8" in caplog.text
    assert logits(model, token_ids).isfinite().all()
    with pytest.raises(IncompatibleDonorError, match="cannot hold these layers"):
        model.merge_and_unload()


@pytest.mark.parametrize(
    ("layers", "position", "mode", "told"),
    [
        ((0, 1), 3, "insert", r"at position 3; fitting positions: 0, 1$"),  # a dense layer among those with experts
        ((2, 3), 0, "insert", r"at position 0; fitting positions: 1, 2, 3, 4$"),
        ((0, 1), 2, "replace", r"at position 2; fitting positions: 0, 1$"),
        ((0, 2), 2, "insert", r"at position 2; fitting positions: 1$"),
    ],
)
def test_the_check_says_which_positions_would_do(layers, position, mode, told):
    """dots1 says by a count that its first layers are dense, so they can stand nowhere else."""
    base = tiny_model("dots1")
    donor = DonorModel.from_base(base, layers)
    (problem,) = check_compatibility(donor, base.config, position=position, mode=mode)
    assert "have other modules than the donor's" in problem
    with pytest.raises(IncompatibleDonorError, match=told):
        TransplantedForCausalLM.from_pretrained(base, donor, position=position, mode=mode)


def test_the_check_says_when_no_position_would_do():
    donor = DonorModel.from_base(tiny_model("llama", attention_bias=True), (1, 3))
    (problem,) = check_compatibility(donor, tiny_config("llama"))
    assert "self_attn.q_proj.bias" in problem
    assert problem.endswith("at every position; cut a donor of layers like the recipient's")
