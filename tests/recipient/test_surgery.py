"""Layers are put together in the order of their positions, and all that depends on their places follows."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    LlamaForCausalLM,
    PreTrainedModel,
)

from not_hf import (
    DonorModel,
    TransplantedForCausalLM,
    TransplantedModel,
)
from not_hf.recipient import surgery
from testing.donors import tiny_organ, transplanted
from testing.models import logits, tiny_config, tiny_model
from testing.shapes import LLAMA, SPECIAL

A, B, C = tiny_organ(1, layers=(1, 2)), tiny_organ(2, layers=(0, 2)), tiny_organ(3, layers=(1, 2))
(a,), (b0, b1) = (list(donor.stack.layers) for donor in (A, B))


def by_hand(slots: list) -> PreTrainedModel:
    """A native llama whose layers are put together without not_hf: numbers are the base's own layers."""
    base = tiny_model("llama")
    native = tiny_model("llama", num_hidden_layers=len(slots))
    native.load_state_dict({k: v for k, v in base.state_dict().items() if "layers" not in k}, strict=False)
    for n, slot in enumerate(slots):
        source = base.model.layers[slot] if isinstance(slot, int) else slot
        native.model.layers[n].load_state_dict(source.state_dict())
    return native


@pytest.mark.parametrize(
    ("donors", "expected"),
    [
        ([("a", A, {"position": 0})], [a, 0, 1, 2, 3]),
        ([("a", A, {"position": 4})], [0, 1, 2, 3, a]),
        ([("b", B, {"position": 1, "mode": "replace"})], [0, b0, b1, 3]),
        ([("a", A, {"position": 2}), ("b", B, {"position": 2})], [0, 1, a, b0, b1, 2, 3]),
        ([("b", B, {"position": 2}), ("a", A, {"position": 2})], [0, 1, b0, b1, a, 2, 3]),
        ([("b", B, {"position": 1, "mode": "replace"}), ("a", A, {"position": 4})], [0, b0, b1, 3, a]),
        ([("a", A, {"position": 1}), ("b", B, {"position": 1, "mode": "replace"})], [0, a, b0, b1, 3]),
        ([("b", B, {"position": 1, "mode": "replace"}), ("a", A, {"position": 1})], [0, b0, b1, a, 3]),
        ([("b", B, {"position": 0, "mode": "replace"}), ("a", A, {"position": 2, "mode": "replace"})], [b0, b1, a, 3]),
    ],
)
def test_positions_count_the_recipients_own_layers(donors, expected, token_ids):
    model = transplanted(*donors)
    assert model.active_donors == [name for name, _, _ in donors]
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == list(range(len(expected)))
    assert torch.equal(logits(model, token_ids), logits(by_hand(expected), token_ids))
    native = model.merge_and_unload()
    assert type(native) is LlamaForCausalLM and not isinstance(native, TransplantedForCausalLM)
    assert torch.equal(logits(native, token_ids), logits(by_hand(expected), token_ids))


def test_a_config_that_two_models_share_is_left_alone(monkeypatch):
    config = tiny_config("llama")
    base, other = LlamaForCausalLM(config), LlamaForCausalLM(config)
    real, wanted = surgery.set_layer_index, iter([0])
    monkeypatch.setattr(surgery, "set_layer_index", lambda *args: 1 // next(wanted, 1) and real(*args))
    with pytest.raises(ZeroDivisionError):
        TransplantedForCausalLM.from_pretrained(base, B)
    assert base.config is base.model.config is other.config is config
    model = TransplantedForCausalLM.from_pretrained(base, B)
    assert model.config.num_hidden_layers == 6 and model.config is model.model.config is not config
    assert all(layer.self_attn.config is model.config for layer in model.model.layers)
    assert other.config is config and config.num_hidden_layers == 4
    model.config.pad_token_id = 7  # what is changed meanwhile stays, as without organs
    native = model.unload()
    assert native.config.num_hidden_layers == 4 and native.config.pad_token_id == 7 and config.pad_token_id != 7
    assert all(layer.self_attn.config is native.config for layer in native.model.layers)


def test_hidden_states_and_attentions_follow_every_change(token_ids):
    model = tiny_model("llama", attn_implementation="eager")
    model.set_attn_implementation("eager")

    def counts(model):
        out = model(token_ids, output_hidden_states=True, output_attentions=True)
        return len(out.hidden_states), len(out.attentions)

    assert counts(model) == (5, 4)
    model = TransplantedForCausalLM.from_pretrained(model, B, position=2)
    assert counts(model) == (7, 6)
    with model.disable_donors():
        assert counts(model) == (5, 4)
    assert counts(model) == (7, 6)
    assert counts(model.unload()) == (5, 4)


def test_what_a_model_derives_from_its_layer_types_is_kept_in_step(token_ids):
    """qwen3 builds sliding masks only where `has_sliding_layers`, which its constructor sets."""
    window = {"use_sliding_window": True, "sliding_window": 6}
    base = tiny_model("qwen3", **window, layer_types=["full_attention"] * 4)
    assert base.model.has_sliding_layers is False
    before = logits(base, token_ids)
    sliding = DonorModel.from_base(tiny_model("qwen3", **window, layer_types=["sliding_attention"] * 4), (0, 1))
    model = TransplantedForCausalLM.from_pretrained(base, sliding)
    model.load_donor(tiny_organ(5, "qwen3", (0, 1)), "other", position=4)
    assert model.model.has_sliding_layers is True
    assert model.config.layer_types.count("sliding_attention") == 1
    model.set_donor("other")
    assert model.model.has_sliding_layers is False
    model.set_donor("default")
    assert model.model.has_sliding_layers is True
    assert generate_cached_equals_uncached(model, token_ids)
    assert torch.equal(logits(model.unload(), token_ids), before)
    assert base.model.has_sliding_layers is False


def generate_cached_equals_uncached(model, ids):
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    return torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


def test_a_name_can_be_used_again_for_an_organ_of_another_kind(token_ids):
    window = {"use_sliding_window": True, "sliding_window": 6}
    full, sliding = (
        DonorModel.from_base(tiny_model("qwen3", **window, layer_types=[kind] * 4), (0, 1))
        for kind in ("full_attention", "sliding_attention")
    )
    model = tiny_model("qwen3", **window, layer_types=["full_attention"] * 4)
    model = TransplantedForCausalLM.from_pretrained(model, full, donor_name="x", position=2)
    model.delete_donor("x")
    model.load_donor(sliding, "x", position=2)
    assert model.model.has_sliding_layers is True
    assert logits(model, token_ids).isfinite().all()


@pytest.mark.parametrize("step", ["set_layer_index", "forget_capture_hooks", "splice_config"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_change_that_breaks_off_midway_is_undone(step, error, token_ids, monkeypatch):
    model = transplanted(("a", A, {"position": 1}), ("b", B, {"position": 1, "mode": "replace"}))
    model.set_donor("a")
    before, config = logits(model, token_ids), model.config.to_dict()
    real = getattr(surgery, step)

    def breaks_once(*args):
        monkeypatch.setattr(surgery, step, real)
        raise error

    for change in (lambda: model.set_donor("b"), lambda: model.load_donor(C, "c"), lambda: model.delete_donor("a")):
        monkeypatch.setattr(surgery, step, breaks_once)
        with pytest.raises(error):
            change()
        assert model.active_donors == ["a"] and list(model.donor_config) == ["a", "b"]
        assert model.config.to_dict() == config and torch.equal(logits(model, token_ids), before)
        assert [layer.self_attn.layer_idx for layer in model.model.layers] == list(range(5))


@pytest.mark.slow
@pytest.mark.skipif("molmo2_text" not in CONFIG_MAPPING, reason="transformers does not have it yet")
def test_lists_that_a_model_makes_of_its_config_follow_the_layers(token_ids, tmp_path):
    """Whether the rotary embedding of a layer is scaled."""
    rotary = {"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0}
    shape = {**SPECIAL, **LLAMA, "additional_vocab_size": 8, "rope_scaling_layers": [1, 3], "rope_parameters": rotary}
    torch.manual_seed(0)
    base = AutoModel.from_config(AutoConfig.for_model("molmo2_text", **shape)).eval()
    donor = DonorModel.from_base(base, (0, 2), position=3, init="identity")
    with torch.no_grad():
        expected = base(token_ids).last_hidden_state
        model = TransplantedModel.from_pretrained(base, donor)
        assert model.rope_types == [f"{'un' * (not n)}scaled" for n in (0, 1, 0, 0, 1, 1)]
        assert torch.equal(model(token_ids).last_hidden_state, expected)
        with model.disable_donors():
            assert torch.equal(model(token_ids).last_hidden_state, expected)
        model.merge_and_unload().save_pretrained(tmp_path)
        assert torch.equal(AutoModel.from_pretrained(tmp_path)(token_ids).last_hidden_state, expected)
