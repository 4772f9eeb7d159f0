"""What a training adds to the configs of its organs, and so to their cards: tokens seen, and its evaluations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel
from transformers.trainer_callback import TrainerState

from not_hf.cards.metrics import perplexities, trainer_metrics
from not_hf.config import DonorConfig
from not_hf.recipient.mixin import Recipient


class TrainingRecord:
    """Remembers what was known of the trainable organs before a training.

    Args:
        model: The model to be trained, with organs or without.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        organs = trained_organs(model)
        self._tokens = {name: config.tokens_seen or 0 for name, config in organs.items()}
        self._metrics = {name: config.metrics for name, config in organs.items()}
        self._perplexities: dict[int, dict[str, float]] = {}  # by step and name of the evaluation set

    def note_tokens(self, model: PreTrainedModel, state: TrainerState) -> None:
        """Write how many tokens the organs were trained on, earlier trainings included."""
        for name, config in trained_organs(model).items():
            if name in self._tokens and state.num_input_tokens_seen:
                config.tokens_seen = self._tokens[name] + int(state.num_input_tokens_seen)

    def add_evaluation(self, step: int, logs: Mapping[str, Any]) -> None:
        """Remember what the trainer measured on its evaluation sets after a step."""
        self._perplexities.setdefault(step, {}).update(perplexities(logs))

    def note_evaluations(self, model: PreTrainedModel, step: int) -> None:
        """Write the perplexities that were measured after a step, in place of those from before the training.

        Numbers that somebody else has written in the meantime stay. Those of a model with several active organs are
        not one organ's own, and are left out.

        Args:
            model: The model, with the weights that it had after that step.
            step: At least 1.
        """
        metrics = trainer_metrics(self._perplexities.get(step, {}))
        for name, config in trained_organs(model).items():
            if name in self._metrics and config.metrics == self._metrics[name]:
                is_alone = getattr(model, "active_donors", None) == [name]
                self._metrics[name] = config.metrics = metrics if is_alone else None


def trained_organs(model: PreTrainedModel) -> dict[str, DonorConfig]:
    """Configs of the trainable organs, by name."""
    if not isinstance(model, Recipient):
        return {}
    trained = {each.name for each in model.get_donor_status().values() if each.num_trainable_parameters}
    return {name: config for name, config in model.donor_config.items() if name in trained}
