"""Which models can be cut: one rule finds their layers, and what it does not serve is refused with a reason."""

from __future__ import annotations

import pytest
from transformers import AutoModel

from not_hf import DonorModel, UnsupportedArchitectureError, check_compatibility
from not_hf.architecture.stack import head_class
from testing.donors import SPAN
from testing.models import tiny_config, tiny_model
from testing.releases import since
from testing.shapes import REFUSED

REFUSALS = {
    "mistral_large4_text": "shares keys and values between layers that it numbers",
    "recurrent_gemma": "changes hidden states outside of its layers",
    "rwkv": "changes the weights of its layers in place, by where they stand",
    "t5": "is an encoder-decoder",
    "zamba2": "uses the same weights in several layers",
    "zaya": r"changes hidden states outside of its layers \(input_hidden_states_scale\)",
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_cannot_be_cut_is_refused_with_a_reason(model_type, tmp_path):
    config = tiny_config(model_type)
    model = (AutoModel if config.is_encoder_decoder else head_class(config)).from_config(config)
    with pytest.raises(UnsupportedArchitectureError, match=REFUSALS[model_type]):
        DonorModel.from_base(model, SPAN)
    model.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedArchitectureError, match=REFUSALS[model_type]):
        DonorModel.from_base(tmp_path, SPAN)


def test_shared_weights_are_found_in_the_live_model():
    model = tiny_model("llama")
    model.model.layers[2].mlp = model.model.layers[0].mlp
    with pytest.raises(UnsupportedArchitectureError, match="uses the same weights in several layers"):
        DonorModel.from_base(model, SPAN)


@since("transformers", "5.24", "it refuses layers with states")
def test_layers_that_take_the_embeddings_are_refused(monkeypatch):
    """As those of zamba do; a donor has no embeddings."""
    monkeypatch.setattr("not_hf.architecture.stack.UNCUTTABLE", {})
    model = tiny_model("zamba2", layers_block_type=["linear_attention"] * 3 + ["hybrid"])
    with pytest.raises(UnsupportedArchitectureError, match="take the embeddings, too"):
        DonorModel.from_base(model, SPAN)


@pytest.mark.parametrize(
    ("model_type", "overrides", "reason"),
    [
        ("albert", {}, "no list of num_hidden_layers=4 layers"),
        ("mpnet", {}, "cannot be run without their base"),
        ("deberta-v2", {"relative_attention": True}, "cannot be run without their base"),
    ],
)
def test_layers_that_share_are_refused(model_type, overrides, reason):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = tiny_config(model_type, **sizes, **overrides)
    with pytest.raises(UnsupportedArchitectureError, match=reason):
        DonorModel.from_base(head_class(config).from_config(config), SPAN)


def test_the_first_layer_of_modernbert_stays_first():
    """It has no norm before its attention, so neither it nor another may take the other's place."""
    base = tiny_model("modernbert")
    first, second = DonorModel.from_base(base, (0, 1), mode="replace"), DonorModel.from_base(base, (1, 2))
    assert check_compatibility(first, base) == []
    assert "have other modules than the donor's" in check_compatibility(first, base, position=1)[0]
    assert "have other modules than the donor's" in check_compatibility(second, base, position=0)[0]
