"""Checkpoints of several organs: a trainer resumes from them, and brings the best back."""

from __future__ import annotations

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer
from transformers.trainer_callback import TrainerState

from not_hf import DonorModel, DonorTrainer, NotHFError, TransplantedForCausalLM, expand
from not_hf.training.checkpoints import require_same_organs
from testing.models import TOKEN_IDS, logits, tiny_model
from testing.training import losses, made, organ, rows, two_organs

EPOCHS = {"num_train_epochs": 3, "save_strategy": "epoch", "learning_rate": 0.05}


def same(one: TransplantedForCausalLM, other: TransplantedForCausalLM) -> bool:
    return all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


def expanded() -> TransplantedForCausalLM:
    return expand(tiny_model("llama"), 2, is_trainable=True)


@pytest.mark.parametrize(
    ("make", "cls"),
    [
        (two_organs, DonorTrainer),
        pytest.param(two_organs, Trainer, marks=pytest.mark.slow),
        pytest.param(expanded, DonorTrainer, marks=pytest.mark.slow),
        pytest.param(expanded, Trainer, marks=pytest.mark.slow),
    ],
)
def test_a_training_of_several_organs_goes_on_where_it_was(cls, make, tmp_path):
    whole = made(make(), tmp_path / "whole", cls=cls, **EPOCHS)
    whole.train()
    checkpoint = str(tmp_path / "whole/run/checkpoint-3")
    resumed = made(make(), tmp_path / "resumed", cls=cls, **EPOCHS)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert same(whole.model, resumed.model) and not same(whole.model, make())
    assert losses(resumed)[-3:] == losses(whole)[-3:]
    loaded = TransplantedForCausalLM.from_pretrained(tiny_model("llama"), tmp_path / "whole/run/checkpoint-9")
    assert torch.equal(logits(loaded, TOKEN_IDS), logits(whole.model.eval(), TOKEN_IDS))


@pytest.mark.slow
def test_a_training_that_ended_is_over(tmp_path):
    options = {"max_steps": 4, "save_steps": 2, "save_strategy": "steps", "lr_scheduler_type": "constant"}
    whole = made(two_organs(), tmp_path, **options)
    whole.train()
    resumed = made(two_organs(), tmp_path, **options)  # killed after its last checkpoint, within an epoch
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4 and same(whole.model, resumed.model)
    assert not (tmp_path / "run/checkpoint-5").exists()


@pytest.mark.parametrize("cls", [DonorTrainer, pytest.param(Trainer, marks=pytest.mark.slow)])
def test_the_best_of_several_organs_comes_back(cls, tmp_path):
    options = {**EPOCHS, "load_best_model_at_end": True, "eval_strategy": "epoch", "greater_is_better": True}
    trainer = made(two_organs(), tmp_path, cls=cls, eval_dataset=rows(4), metric_for_best_model="loss", **options)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best.endswith("checkpoint-3")  # the loss falls, and the greatest was asked for
    loaded = TransplantedForCausalLM.from_pretrained(tiny_model("llama"), best)
    assert torch.equal(logits(loaded, TOKEN_IDS), logits(trainer.model.eval(), TOKEN_IDS))


def placed(span, base=None, **place) -> TransplantedForCausalLM:
    base = tiny_model("llama") if base is None else base
    options = {key: place.pop(key) for key in ("modules",) if key in place}
    donor = DonorModel.from_base(base, span, mode=place.get("mode", "replace"), **options)
    return TransplantedForCausalLM.from_pretrained(tiny_model("llama"), donor, is_trainable=True, **place)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: placed((2, 3)), r"layers \[0, 1\), not \[2, 3\), position 0, not 2; resume with the donor"),
        (lambda: placed((0, 1), position=1), "position 0, not 1"),
        (lambda: placed((0, 1), mode="insert", position=0), "mode replace, not insert"),
        (lambda: placed((0, 1), modules="outputs"), "modules all, not outputs"),
        (two_organs, r"is of one organ, and the model has \['low', 'top'\]"),
    ],
)
def test_a_checkpoint_of_other_organs_is_refused(other, message, tmp_path):
    placed((0, 1)).save_pretrained(tmp_path / "run/checkpoint-1")
    TrainerState().save_to_json(tmp_path / "run/checkpoint-1/trainer_state.json")
    model = other()
    before = organ(model)
    with pytest.raises(NotHFError, match=message):
        made(model, tmp_path).train(resume_from_checkpoint=True)
    assert all(torch.equal(value, before[name]) for name, value in organ(model).items())


def test_a_checkpoint_of_another_base_is_refused_unless_it_was_moved(tmp_path):
    for name in ("one", "other"):
        tiny_model("llama").save_pretrained(tmp_path / name)
    one, other = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("one", "other"))
    donor = DonorModel.from_base(one, (0, 1))
    TransplantedForCausalLM.from_pretrained(one, donor).save_pretrained(tmp_path / "checkpoint-1")
    model = TransplantedForCausalLM.from_pretrained(other, donor)
    with pytest.raises(NotHFError, match=r"is of another organ than 'default': base .*one, not .*other; resume"):
        require_same_organs(model, tmp_path / "checkpoint-1")
    (tmp_path / "one").rename(tmp_path / "moved")
    require_same_organs(model, tmp_path / "checkpoint-1")


def test_a_checkpoint_of_several_other_organs_is_refused(tmp_path):
    two_organs().save_pretrained(tmp_path)
    require_same_organs(two_organs(), tmp_path)
    model = two_organs()
    model.donor_config["top"].position = 4
    with pytest.raises(NotHFError, match="is of another organ than 'top': position 3, not 4"):
        require_same_organs(model, tmp_path)
    model.delete_donor("low")
    with pytest.raises(NotHFError, match=r"is of organs \['low', 'top'\], and the model has \['top'\]"):
        require_same_organs(model, tmp_path)


def test_names_of_organs_do_not_confuse_their_checkpoint(tmp_path):
    model = two_organs()
    surgery = model._surgery
    surgery.organs = dict(zip(("organ", "token_rows"), surgery.organs.values(), strict=True))
    for name, each in surgery.organs.items():
        each.name = name
    model.save_pretrained(tmp_path / "checkpoint-1")
    before = logits(model.eval(), TOKEN_IDS)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    model.load_state_dict(load_file(tmp_path / "checkpoint-1" / "model.safetensors"), False)
    assert torch.equal(logits(model, TOKEN_IDS), before)


def test_what_is_saved_elsewhere_holds_each_tensor_once(tmp_path):
    model = two_organs()
    model.save_pretrained(tmp_path / "both")
    assert not (tmp_path / "both/model.safetensors").exists()


@pytest.mark.slow
def test_a_trainer_pushes_several_organs_with_their_card(hub, tmp_path):
    trainer = made(two_organs(), tmp_path, cls=Trainer, max_steps=1, hub_model_id="me/two-organs")
    trainer.train()
    trainer.push_to_hub(language="en")
    card = ModelCard.load("me/two-organs")
    assert card.data.library_name == "not_hf" and card.data.language == "en"
    assert 'donor = "me/two-organs"' in card.text and "A *composition*" in card.text
    parameters = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert f"| Parameters | {parameters:,} |" in card.text
