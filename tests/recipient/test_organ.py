"""An organ in a model: other weights are put into it whole or not at all; what is told of it."""

from __future__ import annotations

import pytest
import torch

from not_hf import (
    IncompatibleDonorError,
    TransplantedForCausalLM,
)
from testing.donors import organ, same, scaled_by_hand, tiny_organ, transplanted, weights
from testing.models import logits, tiny_model


@pytest.mark.slow
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
        (lambda: tiny_organ(2, layers=(1, 2)), r"it holds layers \[1, 2\), not \[1, 3\)"),
        (lambda: tiny_organ(2, layers=(0, 2)), r"it holds layers \[0, 2\), not \[1, 3\)"),
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


@pytest.mark.parametrize("interrupts", [{3}, {3, 5}], ids=["changing", "changing and restoring"])
@pytest.mark.parametrize("change", ["swap", "scale"])
def test_a_change_that_breaks_off_leaves_the_weights(change, interrupts, token_ids, monkeypatch):
    model = transplanted(("default", tiny_organ(1), {}))
    model.set_donor_scale("default", 0.5)
    before, held, changes = logits(model, token_ids), model._surgery.organs["default"], model._surgery.changes
    other = transplanted(("default", tiny_organ(2), {}))._surgery.organs["default"]
    real, calls = torch.Tensor.copy_, []

    def breaks(self, *args, **kwargs):
        calls.append(self)
        if len(calls) in interrupts:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    make = {"swap": lambda: held.take_over(other, changes), "scale": lambda: held.rescale(0.25, changes)}
    monkeypatch.setattr(torch.Tensor, "copy_", breaks)
    with pytest.raises(KeyboardInterrupt):
        changes.make(make[change], lambda: None)
    assert len(calls) > max(interrupts)
    monkeypatch.undo()
    assert torch.equal(logits(model, token_ids), before) and held.config.scale == 0.5
    model.set_donor_scale("default", 1)
    assert same(weights(model), weights(transplanted(("default", tiny_organ(1), {}))))


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
