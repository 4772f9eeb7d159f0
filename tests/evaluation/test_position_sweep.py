"""Perplexity at every position is that of the organ loaded there, and costs less."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from not_hf import (
    CorruptDonorError,
    DonorModel,
    IncompatibleDonorError,
    NotHFError,
    TransplantedForCausalLM,
    UnsupportedArchitectureError,
    perplexity,
    sweep_positions,
)
from not_hf.architecture.stack import find_stack
from not_hf.evaluation import swept_places
from not_hf.evaluation.bootstrap import nll_intervals
from testing.donors import moved, organ
from testing.models import TOKEN_IDS, logits, tiny_model, tiny_tokenizer
from testing.shapes import in_matrix

TEXT = [" ".join(f"w{3 + (7 * n + n // 3) % 88}" for n in range(70)), "w5 w6 w7"]
HOW = {"tokenizer": tiny_tokenizer(), "max_length": 32}
BOTH = ("insert", "replace")


def state(model):
    """What must be the same after a sweep."""
    weights = {name: (id(p), p.requires_grad, p.sum().item()) for name, p in model.named_parameters()}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    modes = {name: module.training for name, module in model.named_modules()}
    names = list(getattr(model, "donor_config", {}))
    return type(model), weights, hooks, modes, names, model.config.to_json_string()


def measured(model, texts=TEXT):
    """Nats per token as `perplexity` has it, of texts joined into one stream."""
    return math.log(perplexity.compute(predictions=["\n".join(texts)], model=model, **HOW)["perplexity"])


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma3_text", "mistral", "mixtral"])
def test_the_numbers_are_those_of_the_organ_loaded_there(model_type, tmp_path):
    base = tiny_model(model_type).train()
    before, donor = state(base), organ(base, 1)
    sweep = sweep_positions(base, donor, TEXT, modes=BOTH, **HOW)
    assert state(base) == before
    places = [(row["mode"], row["position"]) for row in sweep.rows]
    assert places == [("insert", n) for n in range(5)] + [("replace", n) for n in range(3)] and not sweep.skipped
    assert sweep.base["nats_per_token"] == pytest.approx(measured(base), rel=1e-6)
    for row in sweep.rows:
        place = {"position": row["position"], "mode": row["mode"]}
        model = TransplantedForCausalLM.from_pretrained(tiny_model(model_type), donor, **place)
        assert row["nats_per_token"] == pytest.approx(measured(model), rel=1e-6)
        assert row["low"] < row["perplexity"] == math.exp(row["nats_per_token"]) < row["high"]
    assert sweep.best == min(sweep.rows, key=lambda row: row["perplexity"])
    assert sweep.num_tokens == sum(sweep.window_tokens) == 73


@pytest.mark.slow
def test_the_layers_below_a_position_run_once_for_each_window(monkeypatch):
    base = tiny_model("llama", num_hidden_layers=8)
    donor, rows = organ(base, 1), [{"input_ids": [*range(3 + n, 19 + n)]} for n in range(6)]
    layer, counts = type(base.model.layers[0]), {}
    run = layer.forward

    def counting(self, hidden_states, *args, **kwargs):
        counts[hidden_states.shape[1]] = counts.get(hidden_states.shape[1], 0) + 1
        return run(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(layer, "forward", counting)
    held = []
    keep = swept_places.PlaceRunner._score
    monkeypatch.setattr(
        swept_places.PlaceRunner,
        "_score",
        lambda self, batch, hidden, *rest: (keep(self, batch, hidden, *rest), held.append(hidden))[0],
    )
    one = sweep_positions(base, donor, rows, batch_size=2)
    assert counts[16] == 3 * (8 + sum(2 + 8 - n for n in range(9)))  # the base, then the rest from each position on
    assert len({id(each) for each in held}) == 3  # batches whose hidden states were there at once
    one_batch = 8 * 2 * 16 * 32 * 4  # entries, rows, tokens, hidden_size, bytes
    for limit, chunks in ((one_batch - 1, 3), (2 * one_batch, 2)):
        counts.clear()
        several = sweep_positions(base, donor, rows, batch_size=2, max_bytes=limit)
        assert counts[16] == 3 * (8 + sum(2 + 8 - n for n in range(9))) and several.rows == one.rows
        runner = swept_places.PlaceRunner(base, donor, "a", [], limit)
        parts = [(slice(0, 2), [swept_places.Window(0, 0, 1, 16)] * 2)] * 3
        assert len(list(runner._chunks(parts, 8))) == chunks


@pytest.mark.slow
def test_other_organs_stay_and_are_in_the_way():
    base = tiny_model("llama")
    model = TransplantedForCausalLM.from_pretrained(base, organ(base, 1), donor_name="sweep", position=1)
    model.load_donor(organ(tiny_model("llama"), 2, (1, 3), mode="replace"), "off", position=2)
    model.set_donor("sweep")
    before, donor = state(model), organ(tiny_model("llama"), 3, (0, 2))
    sweep = sweep_positions(model, donor, TEXT, modes=BOTH, **HOW)
    assert state(model) == before and model.active_donors == ["sweep"]
    assert sweep.base["nats_per_token"] == pytest.approx(measured(model), rel=1e-6)
    (skipped,) = sweep.skipped
    assert (skipped["mode"], skipped["position"]) == ("replace", 0) and "inside a span" in skipped["reason"]
    for row in sweep.rows:
        model.load_donor(donor, "b", position=row["position"], mode=row["mode"])
        assert row["nats_per_token"] == pytest.approx(measured(model), rel=1e-6)
        model.delete_donor("b")
    with model.disable_donors(), pytest.raises(NotHFError, match="inside disable_donors"):
        sweep_positions(model, donor, TEXT, **HOW)
    assert state(model) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"mode": "replace", "modules": "outputs"},
        {"mode": "replace", "scale": 0.5},
    ],
    ids=str,
)
def test_organs_of_other_kinds(options):
    """With embeddings of its own, of parts of layers, and with a scale."""
    base = tiny_model("llama")
    cut = {key: value for key, value in options.items() if key != "scale"}
    donor = organ(base, 1, **cut)
    donor.config.scale = options.get("scale", 1.0)
    sweep = sweep_positions(base, donor, TEXT, modes=[options.get("mode", "insert")], **HOW)
    assert sweep.base["nats_per_token"] == pytest.approx(measured(base), rel=1e-6)
    for row in sweep.rows:
        place = {"position": row["position"], "mode": row["mode"]}
        model = TransplantedForCausalLM.from_pretrained(tiny_model("llama"), donor, **place)
        assert row["nats_per_token"] == pytest.approx(measured(model), rel=1e-6)


def test_a_model_that_cannot_run_in_parts_is_run_whole(monkeypatch, caplog):
    base = tiny_model("llama")
    donor = organ(base, 1)
    expected = sweep_positions(base, donor, TEXT, positions=[4, 1], **HOW)

    def refuse(stack, entry):
        raise UnsupportedArchitectureError("its layers pass on more")

    monkeypatch.setattr(swept_places, "PartialForward", refuse)
    assert sweep_positions(base, donor, TEXT, positions=[1, 4], **HOW).rows == expected.rows
    assert "cannot run in parts: every position is run whole" in caplog.text


@pytest.mark.slow
@pytest.mark.skipif(not in_matrix("gemma4_text"), reason="this release of transformers has no gemma4_text")
def test_above_a_source_of_keys_and_values_the_model_is_run_whole(caplog):
    """Layers 4 to 7 take keys and values of layers 2 and 3, so a pass that starts at layer 3 lacks some."""
    kinds = ["sliding_attention", "full_attention"] * 4
    base = tiny_model("gemma4_text", num_hidden_layers=8, layer_types=kinds, num_kv_shared_layers=4)
    base.config.output_hidden_states = True  # else transformers expects that layers have inputs of their own
    donor = organ(base, 1, (3, 4))
    sweep = sweep_positions(base, donor, TEXT, positions=[2, 3], modes=BOTH, **HOW)
    assert "the model cannot start at layers [3]: it is run whole for them" in caplog.text
    assert [(row["mode"], row["position"]) for row in sweep.rows] == [("insert", 2), ("insert", 3), ("replace", 3)]
    for row in sweep.rows:
        place = {"position": row["position"], "mode": row["mode"]}
        model = TransplantedForCausalLM.from_pretrained(copy.deepcopy(base), donor, **place)
        assert row["nats_per_token"] == pytest.approx(measured(model), rel=1e-6)


def test_rows_are_scored_each_on_its_own():
    base, texts = tiny_model("llama"), [" ".join(f"w{n}" for n in range(3, 60 + n)) for n in range(2)]
    ids = tiny_tokenizer()(texts, add_special_tokens=False)["input_ids"]
    found = perplexity.compute(predictions=texts, model=base, add_start_token=False, **HOW)
    for rows in ([{"input_ids": each} for each in ids], [{"input_ids": torch.tensor(each)} for each in ids]):
        sweep = sweep_positions(base, organ(base, 1), rows, positions=[2], max_length=32)
        assert sweep.num_tokens == found["num_tokens"] == 56 + 57 and len(sweep.window_tokens) == 6
        assert sweep.base["perplexity"] == pytest.approx(found["perplexity"], rel=1e-6)


def test_an_organ_is_not_read_without_its_tokens_and_other_organs_are_told_of():
    base = tiny_model("llama")
    count = len(tiny_tokenizer())
    rows = DonorModel.from_base(base, (1, 2), trainable_token_indices={"embed_tokens": [count - 1]})
    assert sweep_positions(base, rows, TEXT, [1], **HOW).rows
    rows.config.trainable_token_indices = {"embed_tokens": [count]}
    with pytest.raises(NotHFError, match="rows for tokens that the tokenizer lacks"):
        sweep_positions(base, rows, TEXT, [1], **HOW)
    donor, model = organ(base, 1), TransplantedForCausalLM.from_pretrained(base, organ(base, 2), donor_name="law")
    sweep_positions(model, donor, TEXT, [1], **HOW).record(donor)
    assert donor.config.best_position["beside"] == ["law"]


def test_what_cannot_be_swept_is_refused_and_nothing_changes(tmp_path):
    base = tiny_model("llama")
    donor, before = organ(base, 1), state(base)
    other = organ(tiny_model("llama", hidden_size=16), 1)
    for wrong, reason in (
        ({"data": "a text"}, "give \\[text\\] for one text"),
        ({"data": []}, "at least one"),
        ({"data": [{"text": "w5"}]}, "rows with input_ids"),
        ({"data": [{"input_ids": [5]}]}, "1 of 1 rows have fewer than 2 tokens"),
        ({"tokenizer": None}, "needs its tokenizer"),
        ({"modes": "insert"}, "modes must be a list"),
        ({"modes": ["beside"]}, "modes must be a list"),
        ({"positions": []}, "at least one position"),
        ({"positions": 3}, "positions must be a list of integers, got 3"),
        ({"positions": "3"}, "positions must be a list of integers, got '3'"),
        ({"positions": [9, 7]}, "cannot insert 2 layers at position 7 of 4"),
        ({"donor": other}, "hidden_size 16 does not fit recipient hidden_size 32"),
        ({"max_length": 10_000}, "context"),
    ):
        arguments = {"donor": donor, "data": TEXT, "folder": tmp_path / "out", **HOW, **wrong}
        with pytest.raises(NotHFError, match=reason):
            sweep_positions(base, arguments.pop("donor"), arguments.pop("data"), **arguments)
    with pytest.raises(IncompatibleDonorError, match="use mode='replace'"):
        parts = DonorModel.from_base(base, (1, 3), mode="replace", modules="outputs")
        sweep_positions(base, parts, TEXT, **HOW)
    with pytest.raises(UnsupportedArchitectureError, match="BertForMaskedLM does not predict the next token"):
        sweep_positions(tiny_model("bert"), donor, TEXT, **HOW)
    assert state(base) == before and not (tmp_path / "out").exists()
    some = sweep_positions(base, donor, TEXT, positions=[1, 9], **HOW)
    assert [row["position"] for row in some.rows] == [1]
    assert [(each["position"], each["mode"]) for each in some.skipped] == [(9, "insert")]


@pytest.mark.slow
def test_an_interrupted_sweep_leaves_the_model_and_goes_on(tmp_path, monkeypatch):
    base = tiny_model("llama")
    donor, before = organ(base, 1), state(base)
    how = {**HOW, "modes": BOTH, "batch_size": 2, "max_bytes": 0}
    whole = sweep_positions(base, donor, TEXT, **how)
    score, calls = swept_places.nll_of, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 24:  # in the last of three batches
            raise KeyboardInterrupt
        return score(*args)

    monkeypatch.setattr(swept_places, "nll_of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sweep_positions(base, donor, TEXT, folder=tmp_path, **how)
    assert state(base) == before
    saved = json.loads((tmp_path / "sweep.json").read_text())
    assert len(saved["rows"]) == 4 and None in saved["windows"]["nats"]["insert 0"]
    resumed = sweep_positions(base, donor, TEXT, folder=tmp_path, **how)
    assert resumed.rows == whole.rows and resumed.base == whole.base
    assert len(calls) - 24 == 9 * 3 - 23 + 2  # what is missing, the base of that batch again, and of the first one
    assert json.loads((tmp_path / "sweep.json").read_text())["rows"] == whole.rows
    calls.clear()
    assert sweep_positions(base, donor, TEXT, folder=tmp_path, positions=[1], **HOW).rows == whole.rows
    assert len(calls) == 1  # whether it is the same model


def test_a_folder_of_another_sweep_is_refused(tmp_path):
    base = tiny_model("llama")
    donor, scaled = organ(base, 1), organ(base, 1)
    scaled.config.scale = 0.5
    sweep_positions(base, donor, TEXT, [1], folder=tmp_path, **HOW)
    written = (tmp_path / "sweep.json").read_bytes()
    for positions, (arguments, reason) in itertools.product(
        ([2], [1]),  # something is missing, or nothing
        (
            ((base, organ(base, 2), TEXT), "of another organ"),
            ((base, scaled, TEXT), "of another organ, or of one at another scale"),
            ((base, donor, [*TEXT, "w9"]), "of another text"),
            ((moved(tiny_model("llama"), 5), donor, TEXT), "sweep of another model"),
        ),
    ):
        with pytest.raises(NotHFError, match=reason):
            sweep_positions(*arguments, positions, folder=tmp_path, **HOW)
    assert (tmp_path / "sweep.json").read_bytes() == written
    (tmp_path / "sweep.json").write_text("[]")
    with pytest.raises(NotHFError, match="is no record of a sweep"):
        sweep_positions(base, donor, TEXT, [2], folder=tmp_path, **HOW)


@pytest.mark.slow
def test_it_is_saved_and_drawn(tmp_path):
    base = tiny_model("llama")
    base.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    organ(base, 1).save_pretrained(tmp_path / "donor")
    sweep = sweep_positions(str(tmp_path / "base"), tmp_path / "donor", TEXT, modes=BOTH, max_length=32)
    sweep.save(tmp_path / "new")
    saved = json.loads((tmp_path / "new" / "sweep.json").read_text())
    assert (saved["rows"], saved["base"], saved["num_tokens"]) == (sweep.rows, sweep.base, 73)
    assert saved["model"] == str(tmp_path / "base") and saved["donor"] == str(tmp_path / "donor")
    assert {"not_hf", "torch", "transformers"} <= saved.keys()
    for name, row in zip(("insert 0", "base"), (sweep.rows[0], sweep.base), strict=True):
        assert sum(saved["windows"]["nats"][name]) / 73 == pytest.approx(row["nats_per_token"])
    far = dataclasses.replace(sweep, base={key: 100 * value for key, value in sweep.base.items()})
    for name, drawn in (("sweep.png", sweep), ("far.png", far)):  # the latter on a log scale
        drawn.plot(tmp_path / name)
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_one_window_has_no_interval_and_a_broken_model_no_number(tmp_path):
    base = tiny_model("llama")
    sweep = sweep_positions(base, organ(base, 1), ["w5 w6 w7"], tokenizer=tiny_tokenizer())
    assert math.isnan(sweep.best["low"]) and math.isnan(sweep.base["high"])
    sweep.plot(tmp_path / "one.png")
    with torch.no_grad():
        find_stack(base).layers[3].mlp.down_proj.weight.fill_(math.inf)
    broken = sweep_positions(base, organ(tiny_model("llama"), 1), TEXT, **HOW)
    assert len(broken.rows) == 5 and math.isnan(broken.base["perplexity"])
    broken.save(tmp_path)
    assert json.loads((tmp_path / "sweep.json").read_text())["base"]["perplexity"] is None
    broken.plot(tmp_path / "broken.png")


@pytest.mark.slow
def test_intervals_cover_what_they_should():
    """Of 4,000 simulated corpora of 100 windows, 95 % intervals hold the true mean in 93 to 97 %."""
    generator = np.random.default_rng(1)
    tokens = generator.integers(32, 512, size=100).astype(float)
    nats = (2 + generator.gamma(4.0, 0.25, size=(4000, 100))) * tokens
    lows, highs = nll_intervals(nats, tokens)
    assert 0.93 <= np.mean((lows <= 3) & (highs >= 3)) <= 0.97
    low, high = nll_intervals(nats[[0, 0]], tokens)
    assert low[0] == low[1] < high[0] == high[1]


def test_the_model_computes_the_same_afterwards():
    base = tiny_model("gpt2")
    before = logits(base, TOKEN_IDS)
    sweep_positions(base, organ(base, 1), TEXT, modes=BOTH, **HOW)
    assert torch.equal(logits(base, TOKEN_IDS), before)


@pytest.mark.slow
def test_the_best_position_travels_with_the_donor(tmp_path):
    base = tiny_model("llama")
    base.save_pretrained(tmp_path / "base")
    donor = organ(str(tmp_path / "base"), 1, position=0)
    with pytest.raises(NotHFError, match="needs a donor that a sweep was recorded for; give a position, or use"):
        TransplantedForCausalLM.from_pretrained(base, donor, position="best")
    assert type(base) is type(tiny_model("llama"))
    sweep = sweep_positions(base, donor, TEXT, [1, 2, 4], modes=BOTH, **HOW)
    for other, reason in ((organ(base, 2), "of another organ"), (str(tmp_path), "record needs a DonorModel")):
        with pytest.raises(NotHFError, match=reason):
            sweep.record(other)
    diverged = dataclasses.replace(sweep, rows=[{**row, "nats_per_token": math.nan} for row in sweep.rows])
    with pytest.raises(NotHFError, match="no position has a perplexity to record: the organ has diverged"):
        diverged.record(donor)
    sweep.record(donor)
    donor.save_pretrained(tmp_path / "donor")
    best, found = sweep.best, DonorModel.from_pretrained(tmp_path / "donor").config
    assert (found.position, found.best_position["perplexity"]) == (0, best["perplexity"])
    expected = TransplantedForCausalLM.from_pretrained(
        tiny_model("llama"), donor, position=best["position"], mode=best["mode"]
    )
    place = [(best["position"], best["mode"])]
    for model in (
        TransplantedForCausalLM.from_pretrained(tiny_model("llama"), donor, position="best"),
        TransplantedForCausalLM.from_pretrained(tmp_path / "donor", position="best", mode=best["mode"]),
        AutoModelForCausalLM.from_pretrained(tmp_path / "donor", position="best"),
    ):
        assert [(each.position, each.mode) for each in model.get_donor_status().values()] == place
        assert torch.equal(logits(model, TOKEN_IDS), logits(expected, TOKEN_IDS))
    (other,) = set(BOTH) - {best["mode"]}
    with pytest.raises(NotHFError, match=f"is for mode '{best['mode']}', not '{other}'; leave out the mode"):
        expected.load_donor(tmp_path / "donor", "b", position="best", mode=other)
    expected.save_pretrained(tmp_path / "saved")  # and is not lost on the way through a model
    assert DonorModel.from_pretrained(tmp_path / "saved").config.best_position == found.best_position
    learning = TransplantedForCausalLM.from_pretrained(tiny_model("llama"), tmp_path / "donor", is_trainable=True)
    learning.save_pretrained(tmp_path / "trained")
    kept = {key: found.best_position[key] for key in ("position", "mode")}
    assert DonorModel.from_pretrained(tmp_path / "trained").config.best_position == kept
    for wrong in ({"position": "1", "mode": "insert"}, {"position": 1}):
        donor.config.best_position = wrong
        with pytest.raises(CorruptDonorError, match="best_position must hold a position and a mode"):
            TransplantedForCausalLM.from_pretrained(tiny_model("llama"), donor, position="best")
