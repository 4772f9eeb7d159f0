"""Stacks whose layers are of several kinds: what a cache counts by, and rules that place layers by their number."""

from __future__ import annotations

import pytest
import torch

from not_hf import (
    DonorModel,
    IncompatibleDonorError,
    TransplantedForCausalLM,
    UnsupportedArchitectureError,
    check_compatibility,
)
from not_hf.architecture.splicing import splice_config
from testing.donors import organ
from testing.generation import generate
from testing.models import exact_logits, tiny_config, tiny_model
from testing.releases import since

pytestmark = since("transformers", "5.24", "it refuses layers with states")

LINEAR, FULL = "linear_attention", "full_attention"
EVERY_SECOND = {"attn_layer_period": 2, "attn_layer_offset": 1}


def span_of(config, start: int, stop: int) -> dict:
    """The config values of a span."""
    return splice_config(config, [(config, n) for n in range(start, stop)])


def test_a_period_is_kept_or_found_anew():
    config = tiny_config("jamba", num_hidden_layers=16, attn_layer_period=8, attn_layer_offset=4)
    spliced = [span_of(config, *span) for span in ((0, 16), (2, 6), (5, 11), (5, 15))]
    found = [(values["attn_layer_period"], values["attn_layer_offset"]) for values in spliced]
    assert found == [(8, 4), (8, 2), (8, 6), (8, 7)]


@pytest.mark.slow
def test_an_organ_fits_where_the_period_stays(token_ids, tmp_path):
    """Attention stands at 1 and 3 of 4 layers."""
    base = tiny_model("jamba", **EVERY_SECOND)
    donor = organ(base, 1)
    (problem,) = check_compatibility(donor, base, position=2)
    assert problem == (
        "the recipient cannot take these layers (model_type 'jamba' spaces layers evenly (attn_layer_period, "
        "attn_layer_offset), and these would stand at 1, 2, 5 of 6) at position 2; fitting positions: 1, 3"
    )
    with pytest.raises(IncompatibleDonorError, match="fitting positions: 1, 3"):
        TransplantedForCausalLM.from_pretrained(base, donor, position=2)
    model = TransplantedForCausalLM.from_pretrained(base, donor, position=1)
    assert model.config.layer_types == [LINEAR, FULL] * 3
    assert torch.equal(generate(model), generate(model, use_cache=False))
    expected = exact_logits(model, token_ids)
    model.merge_and_unload().save_pretrained(tmp_path)
    assert torch.equal(exact_logits(type(base).from_pretrained(tmp_path), token_ids), expected)


def test_a_list_that_a_config_derives_is_compared_with_that_of_the_layers():
    with pytest.raises(UnsupportedArchitectureError, match=r"its config makes them (linear_a|recurrent, a)"):
        span_of(tiny_config("recurrent_gemma", block_types=["recurrent", "attention"]), 1, 3)


def test_layers_that_a_config_numbers_from_one():
    """Kimi's configs do so beside `layer_types`; other programs read these lists."""
    kinds = {"full_attn_layers": [2, 4], "kda_layers": [1, 3], "short_conv_kernel_size": 4}
    config = tiny_config("kimi_linear", linear_attn_config=kinds)
    assert span_of(config, 1, 4)["linear_attn_config"] == {**kinds, "full_attn_layers": [1, 3], "kda_layers": [2]}


def test_a_span_that_no_config_describes_is_refused():
    with pytest.raises(UnsupportedArchitectureError, match="expects at least one attention layer"):
        DonorModel.from_base(tiny_model("olmo_hybrid"), (2, 3))


@pytest.mark.slow
def test_the_last_attention_layer_stays(token_ids):
    """A cache counts its tokens by the keys of such a layer, and masks and positions follow that count."""
    base = tiny_model("qwen3_next", layer_types=[LINEAR, FULL, LINEAR, LINEAR], num_experts=0)
    linear, full = organ(base, 1, (2, 3), mode="replace"), organ(base, 2, (1, 2))
    (problem,) = check_compatibility(linear, base, position=1)
    assert "needs an attention layer in its stack, by which its cache counts tokens" in problem
    assert problem.endswith("at position 1; fitting positions: 0, 2, 3")
    with pytest.raises(IncompatibleDonorError, match="needs an attention layer"):
        TransplantedForCausalLM.from_pretrained(base, linear, position=1)
    model = TransplantedForCausalLM.from_pretrained(base, full, donor_name="full", position=4)
    model.load_donor(linear, "linear", position=1)
    assert torch.equal(generate(model), generate(model, use_cache=False))
    before = exact_logits(model, token_ids)
    with pytest.raises(UnsupportedArchitectureError, match="needs an attention layer"):
        model.set_donor("linear")
    assert model.active_donors == ["full", "linear"] and torch.equal(exact_logits(model, token_ids), before)


def test_the_first_layer_of_minimax_counts():
    base = tiny_model("minimax")
    donor = organ(base, 1, (1, 2))
    (problem,) = check_compatibility(donor, base, position=0)
    assert "needs an attention layer as its first" in problem and problem.endswith("fitting positions: 1, 2, 3, 4")
    model = TransplantedForCausalLM.from_pretrained(base, donor, position=1)
    assert torch.equal(generate(model), generate(model, use_cache=False))


@pytest.mark.parametrize(
    ("model_type", "all_full"),
    [
        ("bamba", {"attn_layer_indices": [0, 1, 2, 3]}),
        ("granitemoehybrid", {"layer_types": [FULL] * 4}),
        ("lfm2", {"layer_types": ["full_attention"] * 4}),
        ("qwen3_next", {"layer_types": [FULL] * 4}),
    ],
)
def test_layers_of_another_kind_join_a_recipient_that_has_none(model_type, all_full, token_ids, tmp_path):
    donor = organ(tiny_model(model_type), 1, (2, 3), position=1)
    base = tiny_model(model_type, **all_full)
    found = check_compatibility(donor, base, mode="replace")
    assert found == [] and any("layer_types of the organ are" in each for each in found.differences)
    model = TransplantedForCausalLM.from_pretrained(base, donor, mode="replace")
    assert len(set(model.config.layer_types)) == 2
    assert torch.equal(generate(model), generate(model, use_cache=False))
    expected = exact_logits(model, token_ids)
    model.merge_and_unload().save_pretrained(tmp_path)
    assert torch.equal(exact_logits(type(base).from_pretrained(tmp_path), token_ids), expected)
