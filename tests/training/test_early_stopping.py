"""Early stopping counts the evaluations of one set, also those before an interruption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer, TrainerCallback

from not_hf.training.early_stopping import EarlyStopping
from testing.training import made, recipient, rows


class PowerCut(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise InterruptedError


def stopping(folder: Path, patience: int | None, *more: TrainerCallback, **changes: Any) -> Trainer:
    """A training that stops gaining at once: the first evaluation, after a step, is its best."""
    options = {
        "max_steps": 9,
        "learning_rate": 0.0,
        "eval_dataset": {"held-out": rows(2, seed=1), "control": rows(2, seed=2)},
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_held-out_loss",
    }
    counting = [EarlyStopping(patience)] if patience else []
    return made(recipient(), folder, callbacks=[*counting, *more], **{**options, **changes})


@pytest.mark.slow
@pytest.mark.parametrize(("patience", "resumed", "steps"), [(3, 3, 4), (3, 5, 6), (None, 2, 4)])
def test_a_resumed_training_counts_on(patience, resumed, steps, tmp_path, caplog):
    """The first evaluation is a gain; without `patience` no evaluation before the interruption was counted."""
    with pytest.raises(InterruptedError):
        stopping(tmp_path, patience, PowerCut()).train()
    trainer = stopping(tmp_path, resumed)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == steps
    assert "early stopping is disabled" not in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("name", [None, "loss", "eval_loss"])
def test_the_metric_is_named_as_for_the_trainer(name, tmp_path):
    trainer = stopping(tmp_path, 2, eval_dataset=rows(2, seed=1), metric_for_best_model=name)
    trainer.train()
    assert trainer.state.global_step == 3
