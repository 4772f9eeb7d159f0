"""Callbacks that show how training goes: one live line while it runs, and a plot of its curves at the end."""

from __future__ import annotations

import math
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length
from transformers.utils import logging

from not_hf.errors import NotHFError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class ProgressLine(TrainerCallback):
    """Shows training in one line: steps, tokens/s, loss, perplexity of each evaluation set, time left.

        step 120/1000 · 3,120 tokens/s · loss 2.913 · perplexity domain 17.42, control 10.45 · 0:12:31 left

    On a terminal the line is updated in place. Where stderr is anything else (a file, a notebook), or transformers'
    progress bars are turned off, a line is printed at each log. Remove the Trainer's own bar when you add this one.

    Tokens are those that the Trainer counts; `include_num_input_tokens_seen="no"` is changed to `"all"`. tokens/s is
    measured without the time for evaluating and saving; the time left includes it.

    Example:
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
        if self._evaluation is not None:
            self._evaluation.close()
            self._evaluation = None
        self._set_mark(state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._set_mark(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _read(self, logs: Mapping[str, Any]) -> bool:
        """Store the values of a log that are shown; return whether there were any."""
        self._loss = logs.get("loss", self._loss)
        found = dict(_perplexities(logs))
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


class TrainingCurve(TrainerCallback):
    """Plots loss and perplexities into `training_curve.png` in the output folder when training ends.

    Does nothing where matplotlib is not installed. See `plot_training_curve` for what the plot shows.

    Example:
        >>> from transformers import TrainingArguments
        >>> from not_hf import DonorTrainer, TrainingCurve
        >>> def trainer(model, blocks):
        ...     return DonorTrainer(model, TrainingArguments("run"), train_dataset=blocks, callbacks=[TrainingCurve()])
    """

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        drawable = any("loss" in logs or any(_perplexities(logs)) for logs in state.log_history)
        if state.is_world_process_zero and drawable and find_spec("matplotlib"):
            os.makedirs(str(args.output_dir), exist_ok=True)
            plot_training_curve(state.log_history, os.path.join(str(args.output_dir), "training_curve.png"))


def plot_training_curve(log_history: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Plot the loss of a training, and below it the perplexity of each evaluation set.

    The x axis counts tokens where the Trainer counted them (`include_num_input_tokens_seen`, which `DonorTrainer` and
    `ProgressLine` turn on), with the training time on a second axis. Otherwise it counts steps.

    Args:
        log_history: `trainer.state.log_history`, or that of a checkpoint's `trainer_state.json`.
        path: File to write: `.png`, or another format of matplotlib.

    Raises:
        NotHFError: The logs hold no loss, or matplotlib is not installed.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from not_hf import plot_training_curve
        >>> history = [{"step": 10, "loss": 3.1}, {"step": 20, "loss": 2.9}, {"step": 20, "eval_loss": 2.95}]
        >>> file = Path(tempfile.mkdtemp(), "curve.png")
        >>> plot_training_curve(history, file)
        >>> file.exists()
        True
    """
    _draw(log_history).savefig(path, dpi=150)


def _draw(log_history: Sequence[Mapping[str, Any]]) -> Figure:
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter
    except ModuleNotFoundError as error:
        raise NotHFError("plot_training_curve needs matplotlib; pip install not_hf[plot]") from error

    training = [logs for logs in log_history if "loss" in logs]
    evaluations = [logs for logs in log_history if any(_perplexities(logs))]
    panels = [logs for logs in (training, evaluations) if logs]
    if not panels:
        raise NotHFError(
            f"none of {len(log_history)} logs holds a loss; pass trainer.state.log_history of a training with "
            "logging_steps or eval_strategy"
        )
    counted = all("num_input_tokens_seen" in logs for logs in (*training, *evaluations))
    unit = "num_input_tokens_seen" if counted else "step"

    figure = Figure(figsize=(7, 1.2 + 2.4 * len(panels)), layout="constrained")
    axes = list(figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0])
    if training:
        axes[0].plot([logs[unit] for logs in training], [logs["loss"] for logs in training], color="0.35", linewidth=1)
        axes[0].set_ylabel("training loss (nats per token)")
    if evaluations:
        _draw_perplexities(axes[-1], evaluations, unit)
    for panel in axes:
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("tokens" if counted else "steps")
    axes[-1].xaxis.set_major_formatter(EngFormatter(sep=" " if counted else ""))
    if counted and (clock := [logs for logs in log_history if unit in logs and "train_runtime" in logs]):
        _draw_clock(axes[0], [logs[unit] for logs in clock], [logs["train_runtime"] for logs in clock])
    return figure


def _draw_perplexities(panel: Axes, evaluations: Sequence[Mapping[str, Any]], unit: str) -> None:
    """Draw a line for each evaluation set; on a log scale where the values are far apart."""
    from matplotlib.ticker import LogFormatter, LogLocator

    curves: dict[str, list[tuple[float, float]]] = {}
    for logs in evaluations:
        for name, value in _perplexities(logs):
            curves.setdefault(name, []).append((logs[unit], value))
    for name, points in curves.items():
        first, last = points[0][1], points[-1][1]
        label = f"{name or 'held-out'}: {first:,.2f} → {last:,.2f}"
        panel.plot(*zip(*points, strict=True), label=label, marker="o", markersize=3, linewidth=1.5)
    values = [value for points in curves.values() for _, value in points if math.isfinite(value)]
    if values and max(values) > 3 * min(values):
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(math.inf, math.inf)))
        panel.minorticks_off()
    panel.set_ylabel("perplexity")
    panel.legend(frameon=False, fontsize="small")


def _draw_clock(panel: Axes, places: Sequence[float], runtimes: Sequence[float]) -> None:
    """Draw the training time (s) as an axis on top: `runtimes` were reached at `places` on the x axis."""
    from matplotlib.ticker import MaxNLocator

    seconds, earlier = [0.0], 0.0
    for previous, runtime in zip([0.0, *runtimes], runtimes, strict=False):
        earlier += previous if runtime < previous else 0.0  # resumed from a checkpoint: the clock starts at zero again
        seconds.append(earlier + runtime)
    total = seconds[-1]
    size, name = (3600, "h") if total >= 7200 else (60, "min") if total >= 120 else (1, "s")
    steps = MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(0, total / size)
    ticks = [tick for tick in steps if 0 <= tick * size <= total]
    clock = panel.secondary_xaxis("top")
    clock.set_xticks(list(np.interp(np.multiply(ticks, size), seconds, [0, *places])), [f"{tick:g}" for tick in ticks])
    clock.set_xlabel(f"time in training ({name})")


def _perplexities(logs: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield name and perplexity of each evaluation set in a log; an only set (`eval_loss`) has an empty name."""
    for key, loss in logs.items():
        if match := re.fullmatch(r"eval_(?:(.+)_)?loss", key):
            yield match[1] or "", math.exp(loss) if loss < 700 else math.inf  # above, exp overflows
