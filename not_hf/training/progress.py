"""A callback that shows how training goes, in one live line."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length
from transformers.utils import logging

from not_hf.cards.metrics import perplexities


class ProgressLine(TrainerCallback):
    """Shows training in one line: steps, tokens/s, loss, perplexity of each evaluation set, time left.

        step 120/1000 · 3,120 tokens/s · loss 2.913 · perplexity domain 17.42, control 10.45 · 0:12:31 left

    On a terminal the line is updated in place. Where stderr is anything else (a file, a notebook), or transformers'
    progress bars are turned off, a line is printed at each log. Remove the Trainer's own bar when you add this one.

    Tokens are those that the Trainer counts; `include_num_input_tokens_seen="no"` is changed to `"all"`. tokens/s is
    measured without the time for evaluating and saving; the time left includes it.

    Examples:
        >>> import tempfile
        >>> from transformers import LlamaConfig, LlamaForCausalLM, ProgressCallback, Trainer, TrainingArguments
        >>> from not_hf import ProgressLine
        >>> shape = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
        >>> trainer = Trainer(
        ...     LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=2)),
        ...     TrainingArguments(tempfile.mkdtemp(), max_steps=4, logging_steps=2, save_strategy="no"),
        ...     train_dataset=[{"input_ids": [*range(9)], "labels": [*range(9)]}] * 8,
        ...     callbacks=[ProgressLine()],
        ... )
        >>> trainer.remove_callback(ProgressCallback)
        >>> trainer.train().global_step  # on stderr: step 2/4 · 3,404 tokens/s · loss 3.91 · 0:00:00 left
        4
    """

    def __init__(self) -> None:
        self._bar: Any = None  # tqdm; only while training on a terminal
        self._evaluation: Any = None  # tqdm below the first; only while evaluating
        self._loss: float | None = None
        self._perplexities: dict[str, float] = {}
        self._rate: float | None = None  # tokens per second since `_mark`
        self._began = (0.0, 0)  # time (s) and step at the start
        self._mark = (0.0, 0)  # time (s) and number of tokens from which the rate is measured

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the line."""
        if args.include_num_input_tokens_seen == "no":
            args.include_num_input_tokens_seen = "all"  # in every process: the Trainer gathers the count
        self._loss, self._rate, self._perplexities = None, None, {}
        for logs in state.log_history:  # of the checkpoint that training resumes from
            self._read(logs)
        self._began = time.perf_counter(), state.global_step
        self._set_mark(state)
        if state.is_world_process_zero and sys.stderr.isatty() and logging.is_progress_bar_enabled():
            form = "{percentage:3.0f}%|{bar:12}| {desc}"
            self._bar = logging.tqdm(
                total=state.max_steps, initial=state.global_step, bar_format=form, dynamic_ncols=True
            )
            self._bar.set_description_str(self._line(state))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Update the line on a terminal."""
        if self._bar is not None:
            self._measure(state)
            self._bar.set_description_str(self._line(state), refresh=False)
            self._bar.update()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the values of a log."""
        if logs is None or not self._read(logs):
            return
        if "loss" in logs:
            self._measure(state)
            self._set_mark(state)
        if self._bar is not None:
            self._bar.set_description_str(self._line(state))
        elif state.is_world_process_zero:
            print(self._line(state), file=sys.stderr, flush=True)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the progress of an evaluation on a terminal."""
        if self._bar is None:
            return
        if self._evaluation is None:
            loader = kwargs.get("eval_dataloader")
            total = len(loader) if has_length(loader) else None
            self._evaluation = logging.tqdm(total=total, desc="Evaluating", leave=False, dynamic_ncols=True)
        self._evaluation.update()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End the progress of an evaluation."""
        if self._evaluation is not None:
            self._evaluation.close()
            self._evaluation = None
        self._set_mark(state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Leave the time for saving out of the rate."""
        self._set_mark(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End the line."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _read(self, logs: Mapping[str, Any]) -> bool:
        """Store the values of a log that are shown; return whether there were any."""
        self._loss = logs.get("loss", self._loss)
        found = dict(perplexities(logs))
        self._perplexities.update(found)
        return "loss" in logs or bool(found)

    def _set_mark(self, state: TrainerState) -> None:
        self._mark = time.perf_counter(), state.num_input_tokens_seen

    def _measure(self, state: TrainerState) -> None:
        began, tokens = self._mark
        if state.num_input_tokens_seen > tokens:
            self._rate = (state.num_input_tokens_seen - tokens) / (time.perf_counter() - began)

    def _line(self, state: TrainerState) -> str:
        """Format what is known so far."""
        parts = [f"step {state.global_step}/{state.max_steps}"]
        if self._rate is not None:
            parts.append(f"{self._rate:,.0f} tokens/s")
        if self._loss is not None:
            parts.append(f"loss {self._loss:.4g}")
        if self._perplexities:
            each = (f"{name} {value:,.2f}".strip() for name, value in self._perplexities.items())
            parts.append(f"perplexity {', '.join(each)}")
        began, first = self._began
        if first < state.global_step < state.max_steps:
            per_step = (time.perf_counter() - began) / (state.global_step - first)
            parts.append(f"{timedelta(seconds=round(per_step * (state.max_steps - state.global_step)))} left")
        return " · ".join(parts)
