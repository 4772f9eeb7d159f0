"""Which models can be cut: one rule finds their layers, and what it does not serve is refused with a reason."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from not_hf import DonorModel, TransplantedForCausalLM, UnsupportedArchitectureError, check_compatibility
from not_hf.architecture.stack import head_class
from testing.donors import SPAN, organ
from testing.lifecycle import generate
from testing.models import OTHERS, logits, tiny_config, tiny_model


@pytest.mark.parametrize("model_type", OTHERS)
def test_architectures_without_a_line_of_their_own_keep_the_same_promises(model_type, token_ids, tmp_path):
    base = tiny_model(model_type)
    before = logits(base, token_ids)
    model = TransplantedForCausalLM.from_pretrained(base, DonorModel.from_base(base, SPAN, mode="replace"))
    assert torch.equal(logits(model, token_ids), before)
    base = model.unload()
    model = TransplantedForCausalLM.from_pretrained(base, organ(base, 5), position=SPAN[0], mode="replace")
    changed = logits(model, token_ids)
    assert not torch.equal(changed, before)
    assert torch.equal(generate(model), generate(model, use_cache=False))
    model.save_pretrained(tmp_path / "organ")
    again = TransplantedForCausalLM.from_pretrained(tiny_model(model_type), tmp_path / "organ")
    assert torch.allclose(logits(again, token_ids), changed, atol=1e-6)
    native = model.merge_and_unload()
    native.save_pretrained(tmp_path / "merged")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(reloaded, token_ids), changed, atol=1e-6)


@pytest.mark.parametrize(("model_type", "reason"), [("mamba", "recurrent state"), ("t5", "encoder-decoder")])
def test_what_cannot_be_cut_is_refused_with_a_reason(model_type, reason, tmp_path):
    model = AutoModel.from_config(tiny_config(model_type))
    with pytest.raises(UnsupportedArchitectureError, match=reason):
        DonorModel.from_base(model, SPAN)
    model.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedArchitectureError, match=reason):
        DonorModel.from_base(tmp_path, SPAN)


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
