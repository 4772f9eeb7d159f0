"""What each scale of an organ gains and costs."""

from __future__ import annotations

import json
import math

import pytest
import torch

from not_hf import (
    DonorModel,
    NotHFError,
    TransplantedForCausalLM,
    TransplantedForMaskedLM,
    UnsupportedArchitectureError,
    choose_scale,
    perplexity,
)
from not_hf.evaluation.scale_choice import ScaleChoice
from testing.donors import moved
from testing.models import TOKEN_IDS, logits, tiny_model, tiny_tokenizer

DOMAIN, CONTROL = [" ".join(f"w{n}" for n in range(3, 60))], [" ".join(f"w{n}" for n in range(60, 3, -1))]
HOW = {"tokenizer": tiny_tokenizer(), "max_length": 32}


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"mode": "replace", "modules": "outputs"}, {"mode": "insert"}])
def test_perplexities_are_those_of_each_scale_and_the_model_stays(options, tmp_path):
    base = tiny_model("llama")
    model = TransplantedForCausalLM.from_pretrained(
        base, moved(DonorModel.from_base(base, (1, 3), **options), 1), donor_name="a"
    )
    model.set_donor_scale("a", 0.7)
    before = logits(model, TOKEN_IDS)
    choice = choose_scale(model, "a", DOMAIN, CONTROL, scales=(1, 0, 0.5), **HOW)
    assert torch.equal(logits(model, TOKEN_IDS), before) and model.donor_config["a"].scale == 0.7
    assert [row["scale"] for row in choice.rows] == [0, 0.5, 1]
    for row in choice.rows:
        model.set_donor_scale("a", row["scale"])
        for key, text in (("perplexity", DOMAIN), ("control_perplexity", CONTROL)):
            assert row[key] == perplexity.compute(predictions=text, model=model, **HOW)["perplexity"]
    plain = perplexity.compute(predictions=DOMAIN, model=tiny_model("llama"), **HOW)
    assert choice.rows[0]["perplexity"] == plain["perplexity"] and choice.num_tokens == plain["num_tokens"]
    choice.save(tmp_path)
    assert json.loads((tmp_path / "scales.json").read_text())["rows"] == choice.rows
    choice.plot(tmp_path / "scales.png")
    assert (tmp_path / "scales.png").read_bytes()[:4] == b"\x89PNG"


def test_texts_that_wait_elsewhere_stay_there():
    base = tiny_model("llama")
    model = TransplantedForCausalLM.from_pretrained(base, DonorModel.from_base(base, (1, 3)), donor_name="a")
    perplexity.add_batch(predictions=["w5 w6 w7"])
    choice = choose_scale(model, "a", ["w8 w9"], scales=(1,), **HOW)
    waiting = perplexity.compute(model=model, **HOW)
    assert (choice.num_tokens, waiting["num_tokens"]) == (2, 3)


def test_the_front_is_what_no_other_scale_beats():
    values = [(0, 9, 3), (0.5, 7, 3), (0.7, 6, 4), (0.9, 6, 5), (1, 7, 6)]
    rows = [{"scale": scale, "perplexity": ppl, "control_perplexity": control} for scale, ppl, control in values]
    assert [row["scale"] for row in ScaleChoice("a", rows, 1, 1).front] == [0.5, 0.7]
    alone = [{"scale": scale, "perplexity": ppl} for scale, ppl, _ in values]
    assert [row["scale"] for row in ScaleChoice("a", alone, 1, 0).front] == [0.7, 0.9]


def test_a_scale_that_has_diverged_is_not_on_the_front(tmp_path):
    rows = [{"scale": 0.0, "perplexity": 9.0}, {"scale": 1.0, "perplexity": math.nan}]
    choice = ScaleChoice("a", rows, 1, 0)
    assert choice.front == rows[:1]
    choice.save(tmp_path)
    text = (tmp_path / "scales.json").read_text()
    assert json.loads(text)["rows"][1] == {"scale": 1.0, "perplexity": None} and "NaN" not in text


def test_what_cannot_be_measured_is_refused():
    base = tiny_model("llama")
    model = TransplantedForCausalLM.from_pretrained(base, DonorModel.from_base(base, (1, 3)), donor_name="a")
    with pytest.raises(NotHFError, match="LlamaForCausalLM has no organs; transplant one first"):
        choose_scale(tiny_model("llama"), "a", DOMAIN, **HOW)
    with pytest.raises(NotHFError, match="no active organ named 'b'; active: a"):
        choose_scale(model, "b", DOMAIN, **HOW)
    for scales in ((), (float("nan"),)):
        with pytest.raises(NotHFError, match="scales must be finite numbers"):
            choose_scale(model, "a", DOMAIN, scales=scales, **HOW)
    for texts in ({"data": DOMAIN[0]}, {"data": DOMAIN, "control": CONTROL[0]}):
        with pytest.raises(NotHFError, match="must be a list of texts, got a string"):
            choose_scale(model, "a", **texts, **HOW)
    encoder = tiny_model("bert")
    masked = TransplantedForMaskedLM.from_pretrained(encoder, DonorModel.from_base(encoder, (1, 3), mode="replace"))
    with pytest.raises(UnsupportedArchitectureError, match="does not predict the next token"):
        choose_scale(masked, "default", ["w5 w6"], tokenizer=tiny_tokenizer())
    with pytest.raises(NotHFError, match="context"):
        choose_scale(model, "a", DOMAIN, tokenizer=tiny_tokenizer(), max_length=10_000)
    assert model.donor_config["a"].scale == 1
