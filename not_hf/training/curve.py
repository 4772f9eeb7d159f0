"""A plot of a training: loss, and perplexity of each evaluation set."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from not_hf.cards.donor import CURVE
from not_hf.cards.metrics import perplexities
from not_hf.errors import NotHFError
from not_hf.training.figure import add_grid, new_figure, scale_perplexities

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class TrainingCurve(TrainerCallback):
    """Plots loss and perplexities into `training_curve.png` in the output folder when training ends.

    So that the plot begins with the model as it was, evaluations include one before the first step
    (`eval_on_start`), unless `load_best_model_at_end` is set. Does nothing where matplotlib is not installed. See
    `plot_training_curve` for what the plot shows.

    Examples:
        >>> import os, tempfile
        >>> from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
        >>> from not_hf import TrainingCurve
        >>> shape = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
        >>> folder = tempfile.mkdtemp()
        >>> trainer = Trainer(
        ...     LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=2)),
        ...     TrainingArguments(folder, max_steps=4, logging_steps=2, save_strategy="no", disable_tqdm=True),
        ...     train_dataset=[{"input_ids": [*range(9)], "labels": [*range(9)]}] * 8,
        ...     callbacks=[TrainingCurve()],
        ... )
        >>> trainer.train().global_step  # doctest: +ELLIPSIS
        {'loss': ...
        4
        >>> os.listdir(folder)
        ['training_curve.png']
    """

    def __init__(self) -> None:
        self._asked: bool | None = None  # what the arguments say of `eval_on_start`, if this has changed it

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Have the model evaluated before the first step."""
        is_evaluated = args.eval_strategy != "no" and not args.load_best_model_at_end
        if is_evaluated and state.global_step == 0 and find_spec("matplotlib"):
            self._asked, args.eval_on_start = args.eval_on_start, True

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the arguments as they were: that evaluation is over, and a training may end without a word."""
        if self._asked is not None:
            args.eval_on_start, self._asked = self._asked, None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the plot."""
        drawable = any("loss" in logs or any(perplexities(logs)) for logs in state.log_history)
        if state.is_world_process_zero and drawable and find_spec("matplotlib"):
            os.makedirs(str(args.output_dir), exist_ok=True)
            plot_training_curve(state.log_history, os.path.join(str(args.output_dir), CURVE))


def plot_training_curve(log_history: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Plot the loss of a training, and below it the perplexity of each evaluation set.

    The x axis counts tokens where the Trainer counted them (`include_num_input_tokens_seen`, which `DonorTrainer` and
    `ProgressLine` turn on), with the training time on a second axis. Otherwise it counts steps.

    Args:
        log_history: `trainer.state.log_history`, or that of a checkpoint's `trainer_state.json`.
        path: File to write: `.png`, or another format of matplotlib.

    Raises:
        NotHFError: The logs hold no loss, or matplotlib is not installed.

    Examples:
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
    training = [logs for logs in log_history if "loss" in logs]
    evaluations = [logs for logs in log_history if any(perplexities(logs))]
    panels = [logs for logs in (training, evaluations) if logs]
    if not panels:
        raise NotHFError(
            f"none of {len(log_history)} logs holds a loss; pass trainer.state.log_history of a training with "
            "logging_steps or eval_strategy"
        )
    counted = all("num_input_tokens_seen" in logs for logs in (*training, *evaluations))
    unit = "num_input_tokens_seen" if counted else "step"

    figure = new_figure(7, 1.2 + 2.4 * len(panels), "plot_training_curve")
    axes = list(figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0])
    if training:
        dots = {"marker": "o", "markersize": 3} if len(training) == 1 else {}  # a line through one point is invisible
        places, losses = [logs[unit] for logs in training], [logs["loss"] for logs in training]
        axes[0].plot(places, losses, color="0.35", linewidth=1, **dots)
        axes[0].set_ylabel("training loss (nats per token)")
    if evaluations:
        _draw_perplexities(axes[-1], evaluations, unit)
    from matplotlib.ticker import EngFormatter

    for panel in axes:
        add_grid(panel)
    axes[-1].set_xlabel("tokens" if counted else "steps")
    axes[-1].xaxis.set_major_formatter(EngFormatter(sep=" " if counted else ""))
    if counted and (clock := [logs for logs in log_history if unit in logs and "train_runtime" in logs]):
        _draw_clock(axes[0], [logs[unit] for logs in clock], [logs["train_runtime"] for logs in clock])
    return figure


def _draw_perplexities(panel: Axes, evaluations: Sequence[Mapping[str, Any]], unit: str) -> None:
    """Draw a line for each evaluation set."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for logs in evaluations:
        for name, value in perplexities(logs):
            curves.setdefault(name, []).append((logs[unit], value))
    for name, points in curves.items():
        (start, first), (_, last) = points[0], points[-1]
        before = f"{first:,.2f} → " if start == 0 else ""  # measured before the first step
        label = f"{name or 'held-out'}: {before}{last:,.2f}"
        panel.plot(*zip(*points, strict=True), label=label, marker="o", markersize=3, linewidth=1.5)
    scale_perplexities(panel, [value for points in curves.values() for _, value in points])
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
