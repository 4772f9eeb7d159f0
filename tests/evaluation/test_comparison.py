"""The difference of two models is that of their perplexities, with an interval that pairs what both have read."""

from __future__ import annotations

import copy
import json
import math

import evaluate
import numpy as np
import pytest
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from not_hf import DonorModel, NotHFError, TransplantedForCausalLM, compare_perplexity, perplexity
from not_hf.evaluation.bootstrap import nll_difference_intervals, nll_intervals
from testing.donors import organ
from testing.models import tiny_model, tiny_tokenizer

TEXTS = [" ".join(f"w{3 + (7 * n + n * line) % 88}" for n in range(20 + 9 * line)) for line in range(8)]
HOW = {"tokenizer": tiny_tokenizer(), "max_length": 32}
KINDS = {"nats_per_token_difference", "perplexity_ratio", "bits_per_byte_difference"}


@pytest.fixture(scope="module")
def model():
    base = tiny_model("llama")
    return TransplantedForCausalLM.from_pretrained(base, organ(base, 1))


def numbers(model, **how):
    """What `perplexity` returns of all texts."""
    found = perplexity.compute(predictions=TEXTS, model=model, **HOW | how)
    return {key: value for key, value in found.items() if key not in ("perplexities", "mean_perplexity")}


@pytest.mark.slow
def test_with_and_without_organs(model):
    found = compare_perplexity(None, model, iter(TEXTS), **HOW)
    assert found["model_b"] == numbers(model) and model.active_donors
    with model.disable_donors():
        assert found["model_a"] == numbers(model)
    assert found["paired_by"] == "window" and found["confidence_interval"].keys() == KINDS
    a, b = found["model_a"], found["model_b"]
    assert found["nats_per_token_difference"] == b["nats_per_token"] - a["nats_per_token"]
    assert found["perplexity_ratio"] == pytest.approx(b["perplexity"] / a["perplexity"])
    assert found["bits_per_byte_difference"] == b["bits_per_byte"] - a["bits_per_byte"]
    for kind in KINDS:
        low, high = found["confidence_interval"][kind]
        assert low < found[kind] < high
    low, high = found["confidence_interval"]["nats_per_token_difference"]
    assert found["confidence_interval"]["perplexity_ratio"] == (math.exp(low), math.exp(high))
    narrow = compare_perplexity(None, model, TEXTS, confidence_level=0.5, seed=1, **HOW)["confidence_interval"]
    assert low < narrow["nats_per_token_difference"].low < narrow["nats_per_token_difference"].high < high


@pytest.mark.slow
def test_live_models_ids_and_donors(model, tmp_path):
    base, other = tiny_model("llama"), tiny_model("llama", seed=1, max_position_embeddings=32)
    for name, each in (("base", base), ("other", other)):
        each.save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    organ(str(tmp_path / "base"), 1).save_pretrained(tmp_path / "donor")
    names = {name: str(tmp_path / name) for name in ("base", "other", "donor")}
    expected = compare_perplexity(None, model, TEXTS, **HOW)
    how = {"max_length": 32, "device": "cpu"}
    assert compare_perplexity(names["base"], names["donor"], TEXTS, **how) == expected
    assert compare_perplexity(None, names["donor"], TEXTS, **how) == expected
    assert compare_perplexity(base, tmp_path / "donor", TEXTS, tokenizer=HOW["tokenizer"], **how) == expected
    swapped = compare_perplexity(names["donor"], names["base"], TEXTS, **how)
    assert swapped["nats_per_token_difference"] == -expected["nats_per_token_difference"]
    for folder in ("a", "b"):
        base.save_pretrained(tmp_path / folder)  # without a tokenizer
    both = compare_perplexity(tmp_path / "a", tmp_path / "b", TEXTS, tokenizer=HOW["tokenizer"], **how)
    assert both["model_a"] == both["model_b"] == expected["model_a"]
    found = compare_perplexity(names["base"], other, TEXTS, tokenizer=names["other"])  # in windows of the smaller one
    assert (found["model_a"], found["model_b"]) == (numbers(base), numbers(other))


def test_models_with_different_tokenizers_are_paired_by_text(model):
    letters = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<s>": 0, **{c: n for n, c in enumerate("w0123456789 ", 1)}})),
        bos_token="<s>",
    )
    letters.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    other = tiny_model("gpt2")
    found = compare_perplexity(model, other, TEXTS, tokenizer=(HOW["tokenizer"], letters), max_length=32)
    assert (found["model_a"], found["model_b"]) == (numbers(model), numbers(other, tokenizer=letters))
    assert found["model_a"]["num_bytes"] == found["model_b"]["num_bytes"] == sum(map(len, TEXTS))
    low, high = found["confidence_interval"]["bits_per_byte_difference"]
    assert low < found["bits_per_byte_difference"] < high and found["paired_by"] == "text"
    for kind in KINDS - {"bits_per_byte_difference"}:
        assert found[kind] is found["confidence_interval"][kind] is None
    with pytest.raises(NotHFError, match=r"tokenize the text differently, .*; give at least 2, got 1"):
        compare_perplexity(model, other, TEXTS[:1], tokenizer=(HOW["tokenizer"], letters))


def test_one_window_has_no_interval_and_results_are_saved(model, tmp_path):
    found = compare_perplexity(None, model, ["w5 w6 w7"], **HOW)
    assert found["confidence_interval"] == dict.fromkeys(KINDS) and found["perplexity_ratio"] > 0
    found = compare_perplexity(None, model, TEXTS, **HOW)
    evaluate.save(tmp_path / "found.json", **found)
    saved = json.loads((tmp_path / "found.json").read_text())
    assert saved["confidence_interval"]["perplexity_ratio"] == list(found["confidence_interval"]["perplexity_ratio"])
    assert saved["model_a"]["perplexity"] == found["model_a"]["perplexity"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"texts": []}, r"no texts to score; give texts=\[text, ...\]"),
        ({"texts": "a text"}, "texts must be a list of texts, got a string"),
        ({"texts": [None]}, "texts must be a list of str, got a NoneType"),
        ({"tokenizer": None}, "a live model needs its tokenizer"),
        ({"tokenizer": (None, HOW["tokenizer"])}, "a live model needs its tokenizer"),
        ({"tokenizer": (HOW["tokenizer"], ByT5Tokenizer())}, "no BOS token; pass add_start_token=False"),
        ({"model_a": None, "model_b": tiny_model("llama")}, "LlamaForCausalLM has no organs to leave out"),
        ({"model_b": None}, "model_b is None; only model_a may be"),
        ({"max_length": 10_000}, "max_length must be between 2 and"),
        ({"confidence_level": 0}, "confidence_level must be between 0 and 1"),
    ],
)
def test_says_what_is_wrong(model, change, message):
    arguments = {"model_a": tiny_model("llama"), "model_b": model, "texts": TEXTS, **HOW, **change}
    with pytest.raises(NotHFError, match=message):
        compare_perplexity(**arguments)


def test_a_live_recipient_is_no_model_to_compare_its_organs_with():
    base = tiny_model("llama")
    model = TransplantedForCausalLM.from_pretrained(base, organ(base, 1))
    for pair in ((base, model), (model.get_base_model(), model), (model, model.get_base_model())):
        with pytest.raises(NotHFError, match="are one model: organs and adapters are put into a live model in place"):
            compare_perplexity(*pair, TEXTS, **HOW)
    other = tiny_model("llama", seed=1)
    other.set_input_embeddings(base.get_input_embeddings())  # which saves memory
    assert compare_perplexity(model, other, TEXTS[:2], **HOW)["perplexity_ratio"] != 1


def test_where_no_organ_is_active_there_is_none_to_leave_out():
    base = tiny_model("llama")
    model = TransplantedForCausalLM.from_pretrained(base, organ(base, 1))
    message = r"no organ is active, so there is none to leave out; activate one with set_donor\(\), outside of disable"
    with model.disable_donors(), pytest.raises(NotHFError, match=message):
        compare_perplexity(None, model, TEXTS, **HOW)
    model.set_donor([])
    with pytest.raises(NotHFError, match=message):
        compare_perplexity(None, model, TEXTS, **HOW)


def test_models_in_a_wrapper():
    base = tiny_model("llama")
    model = TransplantedForCausalLM.from_pretrained(copy.deepcopy(base), organ(base, 1))
    found, lora = compare_perplexity(None, model, TEXTS, **HOW), LoraConfig(task_type="CAUSAL_LM")
    assert compare_perplexity(None, get_peft_model(model, lora), TEXTS, **HOW) == found
    wrapped = get_peft_model(base, lora)
    for pair in ((base, wrapped), (wrapped, base)):
        with pytest.raises(NotHFError, match="are one model"):
            compare_perplexity(*pair, TEXTS, **HOW)


def test_without_organs_there_are_no_rows_for_their_tokens():
    mine = copy.deepcopy(tiny_tokenizer())
    mine.add_tokens(["<verse>"])
    recipient, rows = tiny_model("llama"), {"embed_tokens": [96], "lm_head": [96]}
    recipient.resize_token_embeddings(len(mine), mean_resizing=False)
    donor = DonorModel.from_base(recipient, (2, 3), mode="replace", trainable_token_indices=rows)
    model = TransplantedForCausalLM.from_pretrained(tiny_model("llama"), donor)
    with pytest.raises(NotHFError, match="tokens for which only the organs have rows; give tokenizer="):
        compare_perplexity(None, model, ["<verse> w5", "w6 w7"], tokenizer=mine)
    assert compare_perplexity(None, model, ["w5 w6", "w6 w7"], tokenizer=mine)["paired_by"] == "window"
    found = compare_perplexity(None, model, ["<verse> w5", "w6 w7"], tokenizer=(tiny_tokenizer(), mine))
    assert found["paired_by"] == "text"


@pytest.mark.slow
def test_paired_intervals_cover_what_they_should_and_are_narrow():
    """Of 2,000 simulated pairs on 100 windows, 95 % intervals hold the true difference in 93 to 97 %."""
    generator = np.random.default_rng(1)
    tokens = generator.integers(32, 512, size=100).astype(float)
    hard = generator.gamma(4.0, 0.25, size=(2000, 100))  # for both models
    first, second = (2 + hard + generator.normal(gain, 0.05, size=hard.shape) for gain in (0.0, -0.02))
    lows, highs = nll_difference_intervals((first * tokens, second * tokens), (tokens, tokens))
    covered = np.mean((lows <= -0.02) & (highs >= -0.02))
    assert 0.93 <= covered <= 0.97
    alone_low, alone_high = nll_intervals(second * tokens, tokens)
    assert np.all(highs - lows < 0.5 * (alone_high - alone_low))
