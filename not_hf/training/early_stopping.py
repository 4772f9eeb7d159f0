"""transformers' early stopping, for several evaluation sets and across interruptions."""

from __future__ import annotations

from typing import Any

from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments


class EarlyStopping(EarlyStoppingCallback):
    """Stops after so many evaluations without a gain, counting on from a checkpoint that training resumes from.

    Its patience is the one given now, where `restore_callback_states_from_checkpoint` takes that of the checkpoint.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take over the count."""
        super().on_train_begin(args, state, control, **kwargs)
        stored: dict[str, Any] = state.stateful_callbacks  # type: ignore[assignment]
        own = stored.setdefault(type(self).__name__, self.state())  # a checkpoint of a run without it has none
        self.early_stopping_patience_counter = own["attributes"]["early_stopping_patience_counter"]

    def on_evaluate(  # type: ignore[override]
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any, **kwargs: Any
    ) -> None:
        """Count evaluations on the set of the best model's metric; the others come one by one, too."""
        if f"eval_{str(args.metric_for_best_model).removeprefix('eval_')}" in metrics:
            super().on_evaluate(args, state, control, metrics, **kwargs)
