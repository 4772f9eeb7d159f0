"""How strongly an organ speaks: what a scale may be, and where it goes."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from not_hf import (
    CorruptDonorError,
    DonorModel,
    IncompatibleDonorError,
    NotHFError,
    TransplantedForCausalLM,
    compose,
)
from testing.donors import moved, same, tiny_organ, transplanted, weights
from testing.models import logits, tiny_model


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
        (float("inf"), "replace", NotHFError, "finite number, got inf"),
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
    for attempt in (
        lambda: model.save_pretrained(tmp_path),
        lambda: model.set_donor_scale("default", 1),
        lambda: model.half(),
    ):
        with pytest.raises(NotHFError, match="trained at scale 0"):
            attempt()
    assert torch.equal(logits(model, token_ids), before) and not list(tmp_path.iterdir())


@pytest.mark.slow
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


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float16, 1e6), (torch.float32, 1e39)])
def test_a_scale_that_overflows_is_refused(dtype, scale, token_ids):
    model = TransplantedForCausalLM.from_pretrained(tiny_model("llama").to(dtype), tiny_organ(1), position=2)
    before = logits(model, token_ids)
    with pytest.raises(NotHFError, match=r"weights overflow torch\.float\d\d .*use a smaller scale"):
        model.set_donor_scale("default", scale)
    assert model.donor_config["default"].scale == 1 and torch.equal(logits(model, token_ids), before)


def test_a_scale_that_overflows_where_float32_weights_compute_in_float16_is_refused():
    base = tiny_model("llama").to(torch.float16)
    model = TransplantedForCausalLM.from_pretrained(base, tiny_organ(1), position=2, is_trainable=True)
    with pytest.raises(NotHFError, match=r"weights overflow torch\.float16"):
        model.set_donor_scale("default", 1e7)


def test_a_scale_that_overflows_in_a_donors_config_is_refused(tmp_path):
    tiny_organ(1).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "scale": 1e39}))
    with pytest.raises(NotHFError, match="weights overflow"):
        TransplantedForCausalLM.from_pretrained(tiny_model("llama"), tmp_path)


def test_a_cast_in_which_a_scaled_weight_overflows_is_refused(token_ids):
    model = TransplantedForCausalLM.from_pretrained(tiny_model("llama"), tiny_organ(1), position=2)
    model.set_donor_scale("default", 1e6)
    before = logits(model, token_ids)
    with pytest.raises(NotHFError, match=r"weights overflow torch\.float16"):
        model.half()
    assert model.dtype == torch.float32 and torch.equal(logits(model, token_ids), before)


REPLACED = {"position": 1, "mode": "replace"}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_replacement_moves_between_the_recipient_and_the_organ(dtype, token_ids, tmp_path):
    base = tiny_model("llama").to(dtype)
    before = logits(base, token_ids)
    model = TransplantedForCausalLM.from_pretrained(base, tiny_organ(1), **REPLACED)
    whole = logits(model, token_ids)
    losses = []
    for scale in (0, 0.25, 0.5, 1.5, -1, 1):
        model.set_donor_scale("default", scale)
        losses.append(logits(model, token_ids))
    assert torch.equal(losses[0], before) and torch.equal(losses[-1], whole)
    assert len({each.float().sum().item() for each in losses}) == len(losses)
    model.set_donor_scale("default", 0.7)
    scaled = logits(model, token_ids)
    model.save_pretrained(tmp_path / "organ")
    assert same(DonorModel.from_pretrained(tmp_path / "organ"), tiny_organ(1).to(dtype))
    again = TransplantedForCausalLM.from_pretrained(tiny_model("llama").to(dtype), tmp_path / "organ")
    assert again.donor_config["default"].scale == 0.7 and torch.equal(logits(again, token_ids), scaled)
    native = again.merge_and_unload()
    native.save_pretrained(tmp_path / "native")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "native", dtype=dtype)
    assert same(reloaded, native) and torch.equal(logits(native, token_ids), scaled)


def test_a_replacement_trained_at_a_scale(token_ids, tmp_path):
    model = TransplantedForCausalLM.from_pretrained(tiny_model("llama"), tiny_organ(1), **REPLACED, is_trainable=True)
    model.set_donor_scale("default", 0.5)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(token_ids, labels=token_ids).loss.backward()
    optimizer.step()
    after = logits(model, token_ids)
    model.save_pretrained(tmp_path)
    again = TransplantedForCausalLM.from_pretrained(tiny_model("llama"), tmp_path)
    torch.testing.assert_close(logits(again, token_ids), after, rtol=1e-4, atol=1e-5)
    model.set_donor_scale("default", 0)
    assert torch.equal(logits(model, token_ids), logits(tiny_model("llama"), token_ids))


def test_parts_of_layers_have_a_scale_too(token_ids):
    base = tiny_model("gemma3_text")  # whose norms undo the scale of an inserted organ
    donor = moved(DonorModel.from_base(base, (1, 3), mode="replace", modules="outputs"), 1)
    before = logits(base, token_ids)
    model = TransplantedForCausalLM.from_pretrained(base, donor)
    whole = logits(model, token_ids)
    model.set_donor_scale("default", 0.5)
    assert not torch.equal(logits(model, token_ids), whole)
    model.set_donor_scale("default", 0)
    assert torch.equal(logits(model, token_ids), before)
    model.set_donor_scale("default", 1)
    assert torch.equal(logits(model, token_ids), whole)


def test_layers_of_another_structure_have_no_scale(token_ids):
    base = tiny_model("qwen3_moe")  # sparse layers at 1 and 3
    model = TransplantedForCausalLM.from_pretrained(
        base, DonorModel.from_base(base, (1, 2)), mode="replace", position=0
    )
    with pytest.raises(IncompatibleDonorError, match=r"no scale but 1: the layers that it replaces are .*others"):
        model.set_donor_scale("default", 0.5)
