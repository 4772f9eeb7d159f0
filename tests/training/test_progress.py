"""The progress line and the picture of a training, of real trainings of a tiny model."""

from __future__ import annotations

import io
import re
import sys
import time
from types import SimpleNamespace

import pytest
from datasets import Dataset
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerState
from transformers.utils import logging

from not_hf import NotHFError, TrainingCurve
from not_hf.training import progress
from not_hf.training.curve import _draw, plot_training_curve
from not_hf.training.data import pack
from not_hf.training.progress import ProgressLine
from testing.models import tiny_model, tiny_tokenizer

BLOCK = 16


@pytest.fixture(scope="module")
def blocks() -> Dataset:
    lines = [" ".join(f"w{3 + (start + n) % 90}" for n in range(29)) for start in range(0, 90, 6)]
    return pack(Dataset.from_dict({"text": lines}), tiny_tokenizer(), BLOCK)


class Screen(io.StringIO):
    """A stderr that keeps what it is told, on a terminal or not."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


def trainer(blocks: Dataset, folder, eval_dataset=None, callbacks=(), **options) -> Trainer:
    defaults = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-3,
        "logging_steps": 2,
        "eval_strategy": "steps" if eval_dataset is not None else "no",
        "eval_steps": 3,
        "save_steps": 3,
        "report_to": [],
        "use_cpu": True,
    }
    run = Trainer(
        tiny_model("llama"),
        TrainingArguments(str(folder), **{**defaults, **options}),
        train_dataset=blocks,
        eval_dataset=eval_dataset,
        callbacks=[*callbacks, ProgressLine()],
    )
    run.remove_callback(ProgressCallback)
    return run


def both(blocks: Dataset) -> dict[str, Dataset]:
    return {"domain": blocks.select(range(4)), "control": blocks.select(range(8, 12))}


def parse(line: str) -> dict[str, str]:
    """The parts of a line, by what they are."""
    pattern = (
        r"step (?P<step>\d+)/(?P<total>\d+)( · (?P<rate>[\d,]+) tokens/s)?( · loss (?P<loss>[\d.]+))?"
        r"( · perplexity (?P<perplexity>.+?))?( · (?P<left>\d+:\d\d:\d\d) left)?"
    )
    match = re.fullmatch(pattern, line)
    assert match, line
    return {name: value for name, value in match.groupdict().items() if value is not None}


@pytest.mark.slow
def test_a_plain_line_at_each_log(blocks, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", screen := Screen(terminal=False))
    run = trainer(blocks, tmp_path, both(blocks))
    run.train()
    lines = [parse(line) for line in screen.getvalue().splitlines()]
    assert [line["step"] for line in lines] == ["2", "3", "3", "4", "6", "6", "6"]  # two logs of each evaluation
    assert all(line["total"] == "6" and ("left" in line) == (line["step"] != "6") for line in lines)
    history = run.state.log_history
    losses = [f"{logs['loss']:.4g}" for logs in history if "loss" in logs]
    assert [lines[n]["loss"] for n in (0, 3, 4)] == losses
    assert "perplexity" not in lines[0] and lines[1]["perplexity"].startswith("domain ")
    last = run.evaluate()
    domain, control = (2.718281828 ** last[f"eval_{name}_loss"] for name in ("domain", "control"))
    assert lines[-1]["perplexity"] == f"domain {domain:,.2f}, control {control:,.2f}"
    assert run.state.num_input_tokens_seen == 6 * 4 * BLOCK  # counted though nobody asked for it


@pytest.mark.slow
def test_one_evaluation_set_has_no_name(blocks, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", screen := Screen(terminal=False))
    trainer(blocks, tmp_path, blocks.select(range(4)), include_num_input_tokens_seen="non_padding").train()
    assert re.fullmatch(r"[\d.]+", parse(screen.getvalue().splitlines()[-1])["perplexity"])


class Clock(TrainerCallback):
    """A clock by which steps take a tenth of a second, evaluations 5 and saves 7."""

    now = 100.0

    def on_step_begin(self, *args, **kwargs) -> None:
        self.now += 0.1

    def on_prediction_step(self, *args, **kwargs) -> None:
        self.now += 5

    def on_save(self, *args, **kwargs) -> None:
        self.now += 7


@pytest.mark.slow
def test_tokens_per_second_is_that_of_training_and_time_left_that_of_everything(blocks, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", screen := Screen(terminal=False))
    clock = Clock()
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    evaluation = {"eval_dataset": blocks.select(range(4)), "eval_on_start": True, "eval_steps": 1, "save_steps": 1}
    trainer(blocks, tmp_path, callbacks=[clock], logging_steps=1, max_steps=3, **evaluation).train()
    lines = [parse(line) for line in screen.getvalue().splitlines()]
    assert [line["step"] for line in lines] == ["0", "1", "1", "2", "2", "3", "3"]
    assert [line.get("rate") for line in lines] == [None, *["640"] * 6]  # 64 tokens in a tenth of a second
    # 5.1 s for a step, 10.1 with its evaluation; 17.2 for two with the save between, 22.2 with the evaluation
    assert [line.get("left") for line in lines[1:5]] == ["0:00:10", "0:00:20", "0:00:09", "0:00:11"]


class Unhurried(TrainerCallback):
    """Steps that are long enough to be drawn."""

    def on_step_begin(self, *args, **kwargs) -> None:
        time.sleep(0.15)


@pytest.mark.slow
def test_a_live_line_on_a_terminal(blocks, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", screen := Screen(terminal=True))
    monkeypatch.setattr(logging, "_tqdm_active", True)  # the suite runs with HF_HUB_DISABLE_PROGRESS_BARS
    trainer(blocks, tmp_path, both(blocks), callbacks=[Unhurried()]).train()
    shown = screen.getvalue()
    assert "Evaluating" in shown
    drawn = [part.split("| ")[-1].strip() for part in re.split(r"\r|\n|\x1b\[A", shown) if "step" in part]
    assert len(drawn) > 6  # steps without a log too
    assert parse(drawn[-1])["step"] == "6" and "perplexity" in parse(drawn[-1])
    assert shown.count("\n") <= 1 + 2 * shown.count("\x1b[A")  # but for the moves to the bar below, one line


@pytest.mark.slow
def test_plain_lines_on_a_terminal_without_bars(blocks, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", screen := Screen(terminal=True))
    trainer(blocks, tmp_path).train()
    assert [parse(line)["step"] for line in screen.getvalue().splitlines()] == ["2", "4", "6"]


@pytest.mark.slow
def test_resuming_shows_what_was_known(blocks, tmp_path, monkeypatch):
    trainer(blocks, tmp_path, both(blocks), include_num_input_tokens_seen=True).train()
    monkeypatch.setattr(sys, "stderr", screen := Screen(terminal=False))
    resumed = trainer(blocks, tmp_path, both(blocks), eval_steps=6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    first = parse(screen.getvalue().splitlines()[0])
    assert first["step"] == "4" and first["perplexity"].startswith("domain ") and "control" in first["perplexity"]
    assert resumed.state.num_input_tokens_seen == 6 * 4 * BLOCK


def test_only_the_first_process_speaks(blocks, tmp_path, monkeypatch):
    monkeypatch.setattr(logging, "_tqdm_active", True)
    for terminal in (False, True):
        monkeypatch.setattr(sys, "stderr", screen := Screen(terminal))
        arguments, line = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True), ProgressLine()
        state = TrainerState(max_steps=3, log_history=[], is_world_process_zero=False)
        line.on_train_begin(arguments, state, None)
        line.on_log(arguments, state, None, logs={"loss": 1.0})
        line.on_step_end(arguments, state, None)
        line.on_train_end(arguments, state, None)
        assert screen.getvalue() == "" and arguments.include_num_input_tokens_seen == "all"


@pytest.mark.slow
def test_the_picture_of_a_training(blocks, tmp_path):
    run = trainer(blocks, tmp_path, both(blocks), eval_on_start=True)
    run.train()
    plot_training_curve(run.state.log_history, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    loss, perplexity = _draw(run.state.log_history).axes
    assert loss.get_ylabel() == "training loss (nats per token)" and perplexity.get_ylabel() == "perplexity"
    assert perplexity.get_xlabel() == "tokens"
    (line,) = loss.get_lines()
    assert list(line.get_xdata()) == [2 * 4 * BLOCK, 4 * 4 * BLOCK, 6 * 4 * BLOCK]
    assert list(line.get_ydata()) == [logs["loss"] for logs in run.state.log_history if "loss" in logs]
    domain, control = perplexity.get_lines()
    assert domain.get_label().startswith("domain: ") and control.get_label().startswith("control: ")
    assert list(domain.get_xdata()) == list(control.get_xdata()) == [0, 3 * 4 * BLOCK, 6 * 4 * BLOCK]
    expected = [
        2.718281828 ** logs["eval_domain_loss"] for logs in run.state.log_history if "eval_domain_loss" in logs
    ]
    assert list(domain.get_ydata()) == pytest.approx(expected)
    (clock,) = loss.child_axes
    assert clock.get_xlabel() == "time in training (s)"


@pytest.mark.slow
def test_the_picture_over_steps_where_tokens_were_not_counted(blocks, tmp_path):
    run = trainer(blocks, tmp_path, blocks.select(range(4)))
    run.remove_callback(ProgressLine)
    run.train()
    loss, perplexity = _draw(run.state.log_history).axes
    assert list(perplexity.get_lines()[0].get_xdata()) == [3, 6] and perplexity.get_xlabel() == "steps"
    assert perplexity.get_lines()[0].get_label().startswith("held-out: ")
    assert not loss.child_axes


def test_a_single_loss_can_be_seen_and_nothing_is_called_the_start_that_is_not():
    (panel,) = _draw([{"loss": 3.0, "step": 500}]).axes
    assert panel.get_lines()[0].get_marker() == "o"
    (panel,) = _draw([{"loss": 3.0, "step": 1}, {"loss": 2.0, "step": 2}]).axes
    assert panel.get_lines()[0].get_marker() == "None"

    def label(*steps: int) -> str:
        (panel,) = _draw([{"eval_domain_loss": 3.0 - step / 100, "step": step} for step in steps]).axes
        return panel.get_lines()[0].get_label()

    assert label(0, 100) == "domain: 20.09 → 7.39" and label(50, 100) == "domain: 7.39"


@pytest.mark.slow
def test_the_picture_begins_before_the_first_step(blocks, tmp_path):
    run = trainer(blocks, tmp_path, both(blocks), callbacks=[TrainingCurve()], save_strategy="no")
    run.train()
    assert [logs["step"] for logs in run.state.log_history if "eval_domain_loss" in logs] == [0, 3, 6]
    assert (tmp_path / "training_curve.png").exists()
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_domain_loss"}
    run = trainer(blocks, tmp_path, both(blocks), callbacks=[TrainingCurve()], **best)  # step 0 has no checkpoint
    run.train()
    assert [logs["step"] for logs in run.state.log_history if "eval_domain_loss" in logs] == [3, 6]


@pytest.mark.slow
def test_an_interrupted_training_leaves_its_arguments_as_they_were(blocks, tmp_path):
    class Interrupt(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            raise KeyboardInterrupt

    run = trainer(blocks, tmp_path, both(blocks), callbacks=[TrainingCurve(), Interrupt()], save_strategy="no")
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert run.args.eval_on_start is False and run.state.log_history[0]["step"] == 0


def test_the_clock_goes_on_where_training_was_resumed():
    def log(tokens: int, seconds: float) -> dict[str, float]:
        return {"loss": 1.0, "step": tokens, "num_input_tokens_seen": tokens, "train_runtime": seconds}

    history = [log(10, 100.0), log(20, 200.0), log(30, 50.0), log(40, 150.0)]  # resumed after 20 tokens
    (panel,) = _draw(history).axes
    (clock,) = panel.child_axes
    assert clock.get_xlabel() == "time in training (min)"
    places = dict(zip([label.get_text() for label in clock.get_xticklabels()], clock.get_xticks(), strict=True))
    assert places["0"] == 0 and places["4"] == pytest.approx(28) and "6" not in places  # 240 s; 350 s is the end


def test_a_wide_range_is_drawn_on_a_log_scale():
    def scale(*losses: float) -> str:
        return _draw([{"eval_loss": loss, "step": n} for n, loss in enumerate(losses)]).axes[0].get_yscale()

    assert scale(3.0, 2.9) == "linear" and scale(9.0, 3.0) == "log" and scale(9.0, 1e4) == "linear"


def test_pictures_that_cannot_be_drawn(tmp_path, monkeypatch):
    with pytest.raises(NotHFError, match=r"^none of 1 logs holds a loss; pass trainer\.state\.log_history"):
        plot_training_curve([{"train_runtime": 3.0, "step": 1}], tmp_path / "curve.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(NotHFError, match=r"needs matplotlib; pip install matplotlib$"):
        plot_training_curve([{"loss": 3.0, "step": 1}], tmp_path / "curve.png")
    assert not list(tmp_path.iterdir())
