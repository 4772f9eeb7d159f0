"""Which checkpoints can be restored: those of several organs cannot, which is said before a training."""

from __future__ import annotations

import pytest
from huggingface_hub import ModelCard
from transformers import Trainer

from not_hf import DonorModel, DonorTrainer, NotHFError, TransplantedForCausalLM
from testing.models import tiny_model
from testing.training import made, rows

SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
BEST = {**SAVING, "load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1}


def two_organs() -> TransplantedForCausalLM:
    base = tiny_model("llama")
    donors = [DonorModel.from_base(base, span) for span in ((0, 1), (2, 3))]
    model = TransplantedForCausalLM.from_pretrained(base, donors[0], donor_name="low", is_trainable=True)
    model.load_donor(donors[1], "top", is_trainable=True)
    return model


def test_the_best_of_several_organs_is_refused_before_the_first_step(tmp_path):
    trainer = made(two_organs(), tmp_path, eval_dataset=rows(2), **BEST)
    with pytest.raises(NotHFError, match=r"several organs \(low, top\); leave out load_best_model_at_end") as raised:
        trainer.train()
    assert "\n" not in str(raised.value)
    assert trainer.state.global_step == 0 and not list((tmp_path / "run").iterdir())
    model = two_organs()
    model.delete_donor("low")
    made(model, tmp_path, eval_dataset=rows(2), **BEST).train()


@pytest.mark.parametrize("cls", [DonorTrainer, Trainer])
def test_a_training_of_several_organs_can_be_saved_and_says_that_it_cannot_be_resumed(cls, tmp_path, caplog):
    made(two_organs(), tmp_path, cls=cls, **SAVING).train()
    said = [record.getMessage() for record in caplog.records if "several organs" in record.getMessage()]
    assert len(said) == 1 and "cannot be restored by a trainer" in said[0] and "from_pretrained" in said[0]
    loaded = TransplantedForCausalLM.from_pretrained(tiny_model("llama"), tmp_path / "run/checkpoint-2")
    assert loaded.active_donors == ["low", "top"]
    if cls is DonorTrainer:
        with pytest.raises(NotHFError, match="cannot restore"):
            made(two_organs(), tmp_path, **SAVING).train(resume_from_checkpoint=True)


def test_a_trainer_pushes_several_organs_with_their_card(hub, tmp_path):
    trainer = made(two_organs(), tmp_path, cls=Trainer, max_steps=1, hub_model_id="me/two-organs")
    trainer.train()
    trainer.push_to_hub(language="en")
    card = ModelCard.load("me/two-organs")
    assert card.data.library_name == "not_hf" and card.data.language == "en"
    assert 'donor = "me/two-organs"' in card.text and "A *composition*" in card.text
    parameters = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert f"| Parameters | {parameters:,} |" in card.text
