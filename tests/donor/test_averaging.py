"""Averages of organs: weighted, spherical, and what cannot be averaged."""

from __future__ import annotations

import pytest
import torch

from not_hf import (
    NotHFError,
    TransplantedForCausalLM,
    average_donors,
)
from not_hf.donor.averaging import slerp
from testing.donors import same, tiny_organ, transplanted, weights
from testing.models import logits, tiny_model


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


def test_an_average_has_the_dtype_of_the_first():
    model = TransplantedForCausalLM.from_pretrained(tiny_model("llama").bfloat16(), tiny_organ(1), donor_name="a")
    model.load_donor(tiny_organ(2), "b", is_trainable=True)
    for first, second, dtype in (("a", "b", torch.bfloat16), ("b", "a", torch.float32)):
        model.add_weighted_donor([first, second], None, f"{first} and {second}")
        assert {tensor.dtype for tensor in weights(model, f"{first} and {second}").values()} == {dtype}


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
        (["a", "c"], [1, 1], "mean", "linear", r"layers \[1, 3\) and \[0, 2\) cannot be averaged"),
        (["a", "x"], [1, 1], "mean", "linear", "no organ named x"),
        (["a", "b"], [1, 1], "a", "linear", "is taken"),
    ],
)
def test_what_cannot_be_averaged_is_refused(names, weight, name, kind, message):
    model = transplanted(("a", tiny_organ(1), {}), ("b", tiny_organ(2), {}), ("c", tiny_organ(3, layers=(0, 2)), {}))
    with pytest.raises(NotHFError, match=message):
        model.add_weighted_donor(names, weight, name, kind)
    assert list(model.donor_config) == ["a", "b", "c"]
