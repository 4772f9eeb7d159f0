"""What a training adds to the configs of its organs, and so to their cards: tokens seen, and its evaluations."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from not_hf.cards.metrics import perplexities, place_of, trainer_metrics
from not_hf.config import DonorConfig
from not_hf.recipient.mixin import Recipient
from not_hf.training.checkpoints import ALONE, saved_organs


class TrainingRecord:
    """Remembers what was known of the trained organs before a training.

    Args:
        model: The model to be trained, with organs or without.
        checkpoint: That the training resumes from, if it does.
    """

    def __init__(self, model: PreTrainedModel, checkpoint: str | None = None) -> None:
        organs = trained_organs(model)
        self._tokens = {name: config.tokens_seen or 0 for name, config in organs.items()}
        if checkpoint and organs and (saved := saved_organs(checkpoint)):
            # the donor may be the checkpoint itself, or the model that the interrupted training left
            state = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME))
            seen = {name: saved[ALONE if ALONE in saved else name].tokens_seen or 0 for name in organs}
            self._tokens = {name: max(0, count - int(state.num_input_tokens_seen)) for name, count in seen.items()}
        self._metrics = {name: config.metrics for name, config in organs.items()}
        # by step and active organs, then by name of the evaluation set
        self._perplexities: dict[tuple[int, tuple[Any, ...]], dict[str, float]] = {}

    def note_tokens(self, model: PreTrainedModel, state: TrainerState, step: int) -> None:
        """Write how many tokens the organs were trained on up to a step, earlier trainings included."""
        logs = [log for log in state.log_history if log["step"] == step < state.global_step]
        found = (log["num_input_tokens_seen"] for log in logs if "num_input_tokens_seen" in log)
        count = int(next(found, state.num_input_tokens_seen))
        for name, config in trained_organs(model).items():
            if name in self._tokens and count:
                config.tokens_seen = self._tokens[name] + count

    def add_evaluation(self, model: PreTrainedModel, step: int, logs: Mapping[str, Any]) -> None:
        """Remember what the trainer measured on its evaluation sets after a step, with the organs as they are now."""
        self._perplexities.setdefault((step, _active_places(model)), {}).update(perplexities(logs))

    def note_evaluations(self, model: PreTrainedModel, step: int) -> None:
        """Write the perplexities that were measured after a step, in place of those from before the training.

        Numbers that somebody else has written in the meantime stay. Those of a model with several active organs are
        not one organ's own, and are left out; so are those of the organ at another place or scale, or switched off.

        Args:
            model: The model, with the weights that it had after that step.
            step: At least 1.
        """
        metrics = trainer_metrics(self._perplexities.get((step, _active_places(model)), {}))
        for name, config in trained_organs(model).items():
            if name in self._metrics and config.metrics == self._metrics[name]:
                is_alone = getattr(model, "active_donors", None) == [name]
                self._metrics[name] = config.metrics = metrics if is_alone else None


def _active_places(model: PreTrainedModel) -> tuple[Any, ...]:
    """Names, places and scales of the active organs."""
    if not isinstance(model, Recipient):
        return ()
    return tuple((name, *place_of(model._surgery.organs[name].config).values()) for name in model.active_donors)


def trained_organs(model: PreTrainedModel) -> dict[str, DonorConfig]:
    """Configs of the organs that learn: the active ones of which parameters of their own are trainable, by name."""
    if not isinstance(model, Recipient):
        return {}
    organs, active = model._surgery.organs, model.active_donors
    return {name: organ.config for name, organ in organs.items() if name in active and organ.learns()}
