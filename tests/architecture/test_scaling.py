"""How strongly an organ speaks, swapping its weights, averaging, and what is told of it."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from not_hf import (
    CorruptDonorError,
    DonorModel,
    IncompatibleDonorError,
    NotHFError,
    TransplantedForCausalLM,
    UnsupportedArchitectureError,
    average_donors,
    compose,
)
from not_hf.donor.averaging import slerp
from testing.donors import organ, same, scaled_by_hand, tiny_organ, transplanted
from testing.models import logits, tiny_model


def weights(model, name="default") -> dict[str, torch.Tensor]:
    layers = model._surgery.organs[name].layers
    return {f"{n}.{key}": t.clone() for n, layer in enumerate(layers) for key, t in layer.state_dict().items()}


LINEAR = ("gpt2", "gptj", "opt", "bloom", "falcon", "llama", "mixtral", "qwen3_moe", "gpt_oss", "granite", "cohere")


@pytest.mark.parametrize("model_type", LINEAR)
def test_a_scale_multiplies_what_layers_write_and_comes_off_again(model_type, token_ids, tmp_path):
    donor = tiny_organ(1, model_type)
    model = TransplantedForCausalLM.from_pretrained(tiny_model(model_type), donor)
    base, full, before = logits(tiny_model(model_type), token_ids), logits(model, token_ids), weights(model)
    model.set_donor_scale("default", 0.3)
    by_hand = TransplantedForCausalLM.from_pretrained(tiny_model(model_type), scaled_by_hand(donor, 0.3))
    scaled = logits(model, token_ids)
    assert torch.equal(scaled, logits(by_hand, token_ids)) and not torch.equal(scaled, full)
    model.set_donor_scale("default", 0)
    assert torch.equal(logits(model, token_ids), base)
    model.set_donor_scale("default", 0.3)
    assert torch.equal(logits(model, token_ids), scaled)
    model.save_pretrained(tmp_path)
    assert same(DonorModel.from_pretrained(tmp_path).state_dict(), donor.state_dict())
    assert torch.equal(
        logits(TransplantedForCausalLM.from_pretrained(tiny_model(model_type), tmp_path), token_ids), scaled
    )
    merged = copy.deepcopy(model).merge_and_unload()
    assert torch.equal(logits(merged, token_ids), scaled)
    model.set_donor_scale("default", 1)
    assert same(weights(model), before) and torch.equal(logits(model, token_ids), full)
    assert model._surgery.organs["default"].originals == {}


@pytest.mark.parametrize("model_type", ["olmo2", "gemma2", "gemma3_text"])
def test_layers_with_a_norm_behind_their_projections_have_no_scale(model_type, token_ids):
    model = TransplantedForCausalLM.from_pretrained(tiny_model(model_type), tiny_organ(1, model_type))
    full = logits(model, token_ids)
    with pytest.raises(UnsupportedArchitectureError, match="a norm undoes it"):
        model.set_donor_scale("default", 0.5)
    assert torch.equal(logits(model, token_ids), full)
    model.set_donor_scale("default", 1)


def test_an_organ_that_writes_nothing_yet_can_be_scaled(token_ids):
    donor = DonorModel.from_base(tiny_model("llama"), (1, 3), init="identity")
    model = TransplantedForCausalLM.from_pretrained(tiny_model("llama"), donor)
    model.set_donor_scale("default", 0.5)
    assert torch.equal(logits(model, token_ids), logits(tiny_model("llama"), token_ids))


@pytest.mark.parametrize(
    ("scale", "mode", "error", "message"),
    [
        (float("nan"), "insert", NotHFError, "finite number, got nan"),
        ("0.5", "insert", NotHFError, "finite number, got '0.5'"),
        (True, "insert", NotHFError, "finite number, got True"),
        (0.5, "replace", IncompatibleDonorError, "scale 0.5 is for inserted organs"),
    ],
)
def test_what_is_no_scale_is_refused(scale, mode, error, message, token_ids):
    model = TransplantedForCausalLM.from_pretrained(tiny_model("llama"), tiny_organ(1), mode=mode, position=1)
    full = logits(model, token_ids)
    with pytest.raises(error, match=message):
        model.set_donor_scale("default", scale)
    with pytest.raises(NotHFError, match="no organ named other"):
        model.set_donor_scale("other", 0.5)
    assert torch.equal(logits(model, token_ids), full) and model.donor_config["default"].scale == 1


def test_a_scaled_organ_follows_dtype_copies_and_switching(token_ids):
    model = transplanted(("a", tiny_organ(1), {"position": 1}), ("b", tiny_organ(2), {"position": 3}))
    model.set_donor_scale("a", 0.3)  # exact in no dtype
    model.set_donor("b")
    model.to(torch.bfloat16)
    twin = copy.deepcopy(model)
    twin.set_donor("a")
    alone = transplanted(("a", tiny_organ(1), {"position": 1})).to(torch.bfloat16)
    alone.set_donor_scale("a", 0.3)
    assert torch.equal(logits(twin, token_ids), logits(alone, token_ids))
    twin.set_donor_scale("a", 1)
    assert same(weights(twin, "a"), weights(transplanted(("a", tiny_organ(1), {})).to(torch.bfloat16), "a"))
    assert model.donor_config["a"].scale == 0.3


def test_training_at_a_scale_keeps_the_scale_out_of_the_weights(token_ids, tmp_path):
    model = TransplantedForCausalLM.from_pretrained(tiny_model("llama"), tiny_organ(1), is_trainable=True)
    model.set_donor_scale("default", 0.5)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(token_ids, labels=token_ids).loss.backward()
    optimizer.step()
    after, inside = logits(model, token_ids), weights(model)
    model.save_pretrained(tmp_path, state_dict=model.state_dict())
    again = TransplantedForCausalLM.from_pretrained(tiny_model("llama"), tmp_path)
    assert torch.equal(logits(again, token_ids), after)
    model.set_donor_scale("default", 1)
    assert torch.equal(weights(model)["0.mlp.down_proj.weight"], inside["0.mlp.down_proj.weight"] / 0.5)
    assert torch.equal(weights(model)["0.mlp.up_proj.weight"], inside["0.mlp.up_proj.weight"])


def test_an_organ_trained_at_scale_zero_is_not_saved(token_ids, tmp_path):
    model = TransplantedForCausalLM.from_pretrained(tiny_model("llama"), tiny_organ(1), is_trainable=True)
    model.set_donor_scale("default", 0)
    with torch.no_grad():
        model._surgery.organs["default"].layers[0].mlp.down_proj.weight.add_(1)
    before = logits(model, token_ids)
    for attempt in (lambda: model.save_pretrained(tmp_path), lambda: model.set_donor_scale("default", 1)):
        with pytest.raises(NotHFError, match="trained at scale 0"):
            attempt()
    assert torch.equal(logits(model, token_ids), before) and not list(tmp_path.iterdir())


def test_scales_travel_in_compositions(token_ids, tmp_path, base_folder):
    base = base_folder("llama")
    model = TransplantedForCausalLM.from_pretrained(base, tiny_organ(1), donor_name="a", position=1)
    model.load_donor(tiny_organ(2), "b", position=3)
    model.set_donor_scale("a", 0.5)
    model.save_pretrained(tmp_path / "both")
    entries = json.loads((tmp_path / "both" / "config.json").read_text())["donors"]
    assert [entry["scale"] for entry in entries] == [0.5, 1.0]
    again = TransplantedForCausalLM.from_pretrained(tmp_path / "both")
    assert [status.scale for status in again.get_donor_status().values()] == [0.5, 1.0]
    assert torch.equal(logits(again, token_ids), logits(model, token_ids))
    plan = compose([tmp_path / "both" / "a", tmp_path / "both" / "b"], base)
    plan.save_pretrained(tmp_path / "composed")
    composed = TransplantedForCausalLM.from_pretrained(tmp_path / "composed")
    assert torch.equal(logits(composed, token_ids), logits(model, token_ids))


def test_a_donor_config_with_a_scale_that_is_none_is_corrupt(tmp_path):
    tiny_organ(1).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "scale": float("inf")}))
    with pytest.raises(CorruptDonorError, match="scale must be a finite number"):
        TransplantedForCausalLM.from_pretrained(tiny_model("llama"), tmp_path)


# ------------------------------------------------------------------------------------------------------ swapping


@pytest.mark.parametrize("mode", ["insert", "replace"])
def test_a_swap_puts_other_weights_into_the_same_tensors(mode, token_ids, tmp_path):
    a, b = tiny_organ(1, mode=mode), tiny_organ(2, mode=mode)
    b.save_pretrained(tmp_path)
    model = transplanted(("kjv", a, {"position": 1}), ("law", tiny_organ(3), {"position": 4}))
    places = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    model.hotswap_donor("kjv", tmp_path)
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == places
    expected = transplanted(("kjv", b, {"position": 1}), ("law", tiny_organ(3), {"position": 4}))
    assert torch.equal(logits(model, token_ids), logits(expected, token_ids))
    assert model.get_donor_status()["kjv"].donor == str(tmp_path)
    model.hotswap_donor("kjv", a)
    with model.disable_donors():
        assert torch.equal(logits(model, token_ids), logits(tiny_model("llama"), token_ids))


def test_a_swap_keeps_the_place_the_scale_and_the_flags(token_ids):
    model = TransplantedForCausalLM.from_pretrained(tiny_model("llama"), tiny_organ(1), position=2, is_trainable=True)
    model.set_donor_scale("default", 0.5)
    model.hotswap_donor("default", tiny_organ(2))
    status = model.get_donor_status()["default"]
    assert (status.position, status.scale) == (2, 0.5)
    assert status.num_trainable_parameters == status.num_parameters
    expected = transplanted(("default", scaled_by_hand(tiny_organ(2), 0.5), {"position": 2}))
    assert torch.equal(logits(model, token_ids), logits(expected, token_ids))
    model.set_donor_scale("default", 1)
    assert same(weights(model), weights(transplanted(("default", tiny_organ(2), {}))))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: tiny_organ(2, layers=(1, 2)), r"it holds layers \[1, 2\], not \[1, 3\]"),
        (lambda: tiny_organ(2, layers=(0, 2)), r"it holds layers \[0, 2\], not \[1, 3\]"),
        (lambda: tiny_organ(2, "mistral"), "model_type mistral does not fit"),
        (
            lambda: organ(tiny_model("llama", intermediate_size=40), 2),
            r"has shape \(32, 40\), here \(32, 48\)",
        ),
    ],
)
def test_a_swap_for_another_kind_is_refused_whole(other, message, token_ids):
    model = transplanted(("default", tiny_organ(1), {}))
    before = logits(model, token_ids)
    with pytest.raises(IncompatibleDonorError, match=message):
        model.hotswap_donor("default", other())
    assert torch.equal(logits(model, token_ids), before)


@pytest.mark.parametrize("change", ["swap", "scale"])
def test_a_change_that_breaks_off_leaves_the_weights(change, token_ids, monkeypatch):
    model = transplanted(("default", tiny_organ(1), {}))
    model.set_donor_scale("default", 0.5)
    before, held = logits(model, token_ids), model._surgery.organs["default"]
    other = transplanted(("default", tiny_organ(2), {}))._surgery.organs["default"]
    real, calls = torch.Tensor.copy_, []

    def breaks_once(self, *args, **kwargs):
        calls.append(self)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "copy_", breaks_once)
    with pytest.raises(KeyboardInterrupt):
        held.take_over(other) if change == "swap" else held.rescale(0.25)
    monkeypatch.undo()
    assert torch.equal(logits(model, token_ids), before) and held.config.scale == 0.5
    model.set_donor_scale("default", 1)
    assert same(weights(model), weights(transplanted(("default", tiny_organ(1), {}))))


# ----------------------------------------------------------------------------------------------------- averaging


def test_an_average_is_the_weighted_mean_and_waits_to_be_chosen(token_ids):
    a, b = tiny_organ(1, mode="replace"), tiny_organ(2, mode="replace")
    model = transplanted(("a", a, {}))
    model.set_donor([])
    model.load_donor(b, "b")
    model.add_weighted_donor(["a", "b"], [3, 1], "mean")
    assert model.active_donors == ["b"]
    model.set_donor("mean")
    averaged = average_donors([a, b], [0.75, 0.25])
    expected = {name: (3 * tensor + b.state_dict()[name]) / 4 for name, tensor in a.state_dict().items()}
    for name, tensor in averaged.state_dict().items():
        torch.testing.assert_close(tensor, expected[name])
    alone = TransplantedForCausalLM.from_pretrained(tiny_model("llama"), averaged)
    torch.testing.assert_close(logits(model, token_ids), logits(alone, token_ids))
    model.delete_donor("mean")
    model.set_donor("a")
    assert torch.equal(logits(model, token_ids), logits(transplanted(("a", a, {})), token_ids))


def test_an_average_of_organs_in_training_is_frozen():
    model = transplanted(("a", tiny_organ(1), {"is_trainable": True}), ("b", tiny_organ(2), {"is_trainable": True}))
    model.add_weighted_donor(["a", "b"], None, "mean")
    trainable = {name: status.num_trainable_parameters for name, status in model.get_donor_status().items()}
    assert trainable["mean"] == 0 < trainable["a"] == trainable["b"]


def test_slerp_keeps_lengths_and_meets_the_ends():
    a, b = tiny_organ(1), tiny_organ(2)
    for weight, end in (([1, 0], a), ([0, 1], b)):
        for name, tensor in average_donors([a, b], weight, "slerp").state_dict().items():
            torch.testing.assert_close(tensor, end.state_dict()[name])
    x, y = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0])
    torch.testing.assert_close(slerp([x, y], [1, 1]), torch.full((2,), 2**0.5))
    torch.testing.assert_close(slerp([x, 3 * x], [1, 1]), 2 * x)  # one direction: the mean
    torch.testing.assert_close(slerp([x, 0 * x], [1, 1]), x / 2)


def test_averages_count_at_scale_one():
    model = transplanted(("a", tiny_organ(1), {"position": 1}), ("b", tiny_organ(2), {"position": 3}))
    model.set_donor_scale("a", 0.5)
    model.add_weighted_donor(["a", "b"], None, "mean", combination_type="slerp")
    expected = average_donors([tiny_organ(1), tiny_organ(2)], combination_type="slerp")
    found = {f"{expected.stack.full_path}.{key}": tensor for key, tensor in weights(model, "mean").items()}
    assert same(found, expected.state_dict()) and model.donor_config["mean"].scale == 1


@pytest.mark.parametrize(
    ("names", "weight", "name", "kind", "message"),
    [
        (["a"], [1], "mean", "linear", "needs two or more donors with a weight each, got 1"),
        (["a", "b"], [1], "mean", "linear", "got 2 donors and 1 weights"),
        (["a", "b"], [1, -1], "mean", "linear", "must not sum to 0"),
        (["a", "b"], [1, float("inf")], "mean", "linear", "must be finite"),
        (["a", "b", "b"], [1, 1, 1], "mean", "slerp", "slerp needs two donors"),
        (["a", "b"], [1, 1], "mean", "ties", "combination_type must be one of"),
        (["a", "c"], [1, 1], "mean", "linear", r"layers \[1, 3\] and \[0, 2\] cannot be averaged"),
        (["a", "x"], [1, 1], "mean", "linear", "no organ named x"),
        (["a", "b"], [1, 1], "a", "linear", "is taken"),
    ],
)
def test_what_cannot_be_averaged_is_refused(names, weight, name, kind, message):
    model = transplanted(("a", tiny_organ(1), {}), ("b", tiny_organ(2), {}), ("c", tiny_organ(3, layers=(0, 2)), {}))
    with pytest.raises(NotHFError, match=message):
        model.add_weighted_donor(names, weight, name, kind)
    assert list(model.donor_config) == ["a", "b", "c"]


def test_status_tells_where_organs_stand():
    b = tiny_organ(2, position=1, mode="replace")
    model = transplanted(("a", tiny_organ(1), {"position": 1}), ("b", b, {}))
    status = model.get_donor_status()
    assert [(s.active, s.position, s.mode, s.layers) for s in status.values()] == [
        (True, 1, "insert", [1, 2]),
        (True, 1, "replace", [3, 4]),
    ]
    assert status["a"].span == (1, 3) and status["a"].dtypes == ["float32"] and status["a"].devices == ["cpu"]
    assert status["a"].num_parameters == tiny_organ(1).num_parameters() and status["a"].num_trainable_parameters == 0
    model.set_donor("b")
    assert [(s.active, s.layers) for s in model.get_donor_status().values()] == [(False, []), (True, [1, 2])]
    with model.disable_donors():
        assert not any(s.active for s in model.get_donor_status().values())
