"""Training at several positions gives what training there alone gives, and leaves the model as it was."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorForLanguageModeling, TrainingArguments, default_data_collator

from not_hf import (
    DonorModel,
    DonorTrainer,
    IncompatibleDonorError,
    NotHFError,
    TransplantedForCausalLM,
    sweep_positions,
    train_positions,
)
from not_hf.evaluation import position_training
from testing.donors import organ
from testing.models import TOKEN_IDS, logits, tiny_model, tiny_tokenizer

BLOCKS = [{"input_ids": ids, "labels": ids} for ids in ([3 + (n + 7 * i) % 88 for n in range(16)] for i in range(24))]
TRAINED, HELD_OUT = BLOCKS[:16], BLOCKS[16:]


@pytest.fixture
def how(tmp_path):
    options = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "logging_steps": 100}
    args = TrainingArguments(str(tmp_path / "runs"), max_steps=4, learning_rate=0.01, **options)
    return {"train_dataset": TRAINED, "args": args}


def state(model):
    """What must be the same afterwards."""
    flags = {name: (p.requires_grad, p.sum().item()) for name, p in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    organs = {name: config.position for name, config in getattr(model, "donor_config", {}).items()}
    settings = [each.to_json_string() for each in (model.config, model.generation_config)]
    checkpointing = [getattr(module, "gradient_checkpointing", False) for module in model.modules()]
    gradients = [None if p.grad is None else p.grad.sum().item() for p in model.parameters()]
    hooks = len(model.get_input_embeddings()._forward_hooks)
    return type(model), flags, modes, organs, "forward" in vars(model), settings, any(checkpointing), gradients, hooks


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True])
def test_each_is_what_training_there_gives(how, bf16):
    how["args"].bf16 = bf16
    base = tiny_model("llama").train()
    base.lm_head.weight.requires_grad_(False)
    before, donor = state(base), organ(base, 1)
    found = train_positions(base, donor, HELD_OUT, [4, 1, 9], ["insert", "replace"], **how)
    assert state(base) == before
    assert [(row["mode"], row["position"]) for row in found.rows] == [("insert", 1), ("insert", 4), ("replace", 1)]
    assert [(each["mode"], each["position"]) for each in found.skipped] == [
        ("insert", 9),
        ("replace", 4),
        ("replace", 9),
    ]
    untrained = sweep_positions(base, donor, HELD_OUT, [1, 4], ["insert", "replace"])
    assert found.base == untrained.base
    for row in found.rows:
        place = {"position": row["position"], "mode": row["mode"]}
        model = TransplantedForCausalLM.from_pretrained(tiny_model("llama"), donor, **place, is_trainable=True)
        trainer = DonorTrainer(model, copy.copy(how["args"]), train_dataset=TRAINED)
        trainer.train()
        expected = trainer.evaluate(HELD_OUT)["eval_loss"]
        assert row["nats_per_token"] == pytest.approx(expected, rel=2e-2 if bf16 else 1e-5)
        (start,) = (each for each in untrained.rows if place.items() <= each.items())
        assert row["nats_per_token"] < start["nats_per_token"] and row["low"] < row["perplexity"] < row["high"]
    found.record(donor)
    assert donor.config.best_position == {key: found.best[key] for key in ("position", "mode")}  # no number of its own


def test_what_a_trainer_sets_is_undone(how, tmp_path):
    base, tokenizer = tiny_model("llama"), tiny_tokenizer()
    for parameter in base.parameters():
        parameter.grad = torch.ones_like(parameter)
    before, tokenizer.pad_token = state(base), "<mask>"  # not the base's, so a trainer sets it
    how["args"] = TrainingArguments(
        str(tmp_path), max_steps=1, gradient_checkpointing=True, report_to="none", disable_tqdm=True, use_cpu=True
    )
    train_positions(base, organ(base, 1), HELD_OUT, [1], **how, processing_class=tokenizer)
    assert state(base) == before


@pytest.mark.slow
def test_other_organs_stay_as_they_were(how):
    base = tiny_model("llama")
    model = TransplantedForCausalLM.from_pretrained(base, organ(base, 1), donor_name="sweep", is_trainable=True)
    before, expected = state(model), logits(model, TOKEN_IDS)
    found = train_positions(model, organ(tiny_model("llama"), 2, (0, 1)), HELD_OUT, [0], **how)
    assert state(model) == before and torch.equal(logits(model, TOKEN_IDS), expected)
    assert found.base == sweep_positions(model, organ(tiny_model("llama"), 2), HELD_OUT, [0]).base


@pytest.mark.slow
def test_other_layers_at_each_position(how):
    base, called = tiny_model("llama"), []

    def cut(position, mode):
        called.append((position, mode))
        return DonorModel.from_base(tiny_model("llama"), (min(position, 3), min(position, 3) + 1), mode=mode)

    found = train_positions(base, cut, HELD_OUT, [0, 2, 4], ["replace"], **how)
    assert [row["position"] for row in found.rows] == [0, 2] and len(found.skipped) == 1
    assert set(called) == {(0, "replace"), (2, "replace"), (4, "replace")}
    alone = train_positions(base, cut(2, "replace"), HELD_OUT, [2], ["replace"], **how)
    assert alone.rows == found.rows[1:]


@pytest.mark.slow
def test_an_interrupted_one_goes_on(how, tmp_path, monkeypatch):
    base, folder = tiny_model("llama"), tmp_path / "out"
    donor, before, train, trained = organ(base, 1), state(base), position_training._train, []

    def interrupted(*args):
        trained.append(args)
        if len(trained) == 2:
            raise KeyboardInterrupt
        train(*args)

    monkeypatch.setattr(position_training, "_train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_positions(base, donor, HELD_OUT, [1, 2], folder=folder, **how)
    assert state(base) == before
    assert [row["position"] for row in json.loads((folder / "sweep.json").read_text())["rows"]] == [1]
    found = train_positions(base, donor, HELD_OUT, [1, 2], folder=folder, **how)
    assert len(trained) == 3 and found.rows == train_positions(base, donor, HELD_OUT, [1, 2], **how).rows
    how["args"].output_dir, how["args"].learning_rate = str(tmp_path / "elsewhere"), 0.02
    arguments = {"model": base, "donor": donor, "data": HELD_OUT, "positions": [1], "folder": folder, **how}
    for change, reason in (
        ({}, "of another training"),
        ({"train_dataset": TRAINED[1:]}, "of another training"),
        ({"donor": organ(base, 2)}, "of another organ"),
        ({"data": TRAINED}, "of another text"),
    ):
        with pytest.raises(NotHFError, match=reason):
            train_positions(**arguments | change)
    with pytest.raises(NotHFError, match="of another training"):
        sweep_positions(base, donor, HELD_OUT, [3], folder=folder)


def test_any_other_training_data_are_noticed(how):
    def digest(rows):
        return position_training._digest(rows, how["args"], {})

    rows = [{"input_ids": [*range(n, n + 4)], "labels": [*range(n, n + 4)]} for n in range(1200)]
    other_labels = [*rows[:-1], {**rows[-1], "labels": [-100, *rows[-1]["labels"][1:]]}]
    stream, longer = (Dataset.from_list(each).to_iterable_dataset() for each in (rows, rows[:1100]))
    assert len({digest(each) for each in (rows, rows[:1000], [*rows, rows[0]], other_labels)}) == 4
    assert digest(rows) == digest([{key: torch.tensor(value) for key, value in row.items()} for row in rows])
    assert digest(rows) == digest(Dataset.from_list(rows))
    assert digest(stream) == digest(longer) == digest(rows[:1000])
    wide = [{"input_ids": torch.arange(n, 2000 + n) % 90} for n in range(2)]
    assert digest(wide[:1]) != digest([{"input_ids": wide[0]["input_ids"].index_fill(0, torch.tensor(1000), 0)}])


def test_any_other_trainer_arguments_are_noticed(how):
    def digest(**trainer_kwargs):
        return position_training._digest(TRAINED, how["args"], trainer_kwargs)

    slow, fast = ((torch.optim.AdamW, {"lr": rate}) for rate in (1e-6, 0.05))
    masks = [DataCollatorForLanguageModeling(tiny_tokenizer(), mlm=False, pad_to_multiple_of=n) for n in (None, 8)]
    others: list[dict[str, Any]] = [
        {},
        *({"optimizer_cls_and_kwargs": each} for each in (slow, fast, (torch.optim.SGD, {"lr": 0.05}))),
        *({"data_collator": each} for each in (default_data_collator, *masks)),
        {"compute_loss_func": default_data_collator},
        {"prefix_dtype": torch.float16},
        {"prefix_dtype": torch.bfloat16},
        {"optimizer": "muon"},
    ]
    assert len({digest(**each) for each in others}) == len(others)
    again = DataCollatorForLanguageModeling(tiny_tokenizer(), mlm=False, pad_to_multiple_of=8)
    assert digest(data_collator=again) == digest(data_collator=masks[1])


def test_what_fits_nowhere_is_refused(how):
    base = tiny_model("llama")
    arguments = {"model": base, "donor": organ(base, 1), "data": HELD_OUT, "positions": [1], **how}
    best = TrainingArguments(
        "runs", eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True
    )
    for change, error, reason in (
        ({"positions": [9]}, IncompatibleDonorError, "cannot insert 2 layers at position 9 of 4"),
        ({"positions": []}, NotHFError, "at least one position"),
        ({"positions": None}, NotHFError, "at least one position"),
        ({"positions": 3}, NotHFError, "positions must be a list of integers, got 3"),
        ({"modes": "insert"}, NotHFError, "modes must be a list"),
        ({"data": []}, NotHFError, "at least one"),
        ({"args": best}, NotHFError, "saves no checkpoints to load the best of; leave load_best_model_at_end out"),
    ):
        with pytest.raises(error, match=reason):
            train_positions(**arguments | change)
