"""Training for a given time, and what it takes in memory."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from transformers import (
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)

from not_hf.evaluation.compared_methods import Prepared
from not_hf.evaluation.held_out_text import Blocks

_WARMUP = 8  # steps
_NO_END = 10**9  # steps: the clock ends the training


class _Clock(TrainerCallback):
    """Ends a training after some seconds; the learning rate falls to 0 in a line until then."""

    def __init__(self, seconds: float, rate: float, bar: tqdm) -> None:
        self.seconds, self.rate, self.bar = seconds, rate, bar
        self.started, self.elapsed = 0.0, 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self.started = time.perf_counter()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the learning rate."""
        left = 1 - self.elapsed / self.seconds
        for group in kwargs["optimizer"].param_groups:
            group["lr"] = self.rate * left * min(1, (state.global_step + 1) / _WARMUP)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at the clock."""
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self.elapsed = time.perf_counter() - self.started
        self.bar.update(min(int(self.elapsed), self.bar.total) - self.bar.n)
        control.should_training_stop |= self.elapsed >= self.seconds


def train_for(
    seconds: float, prepared: Prepared, blocks: Blocks, *, name: str, rate: float, batch_size: int, seed: int
) -> dict[str, Any]:
    """Train on blocks, over and over, with AdamW, until the step in which the time is over.

    Args:
        seconds: How long.
        prepared: The model.
        blocks: What is learned.
        name: What is trained, for the progress bar.
        rate: Peak learning rate.
        batch_size: Blocks per step.
        seed: For the order of the blocks, and dropout.

    Returns:
        `steps`, `tokens`, `seconds`, and `peak_bytes`: the most memory that the process, or of an accelerator the
        device, used meanwhile; `None` where the platform does not tell.
    """
    model = prepared.model
    on_cpu = model.device.type == "cpu"
    with (
        tempfile.TemporaryDirectory() as folder,
        tqdm(desc=f"Training {name}", unit=" s", total=int(seconds), delay=2, leave=False) as bar,
    ):
        clock = _Clock(seconds, rate, bar)
        arguments = TrainingArguments(
            folder,
            max_steps=_NO_END,
            per_device_train_batch_size=batch_size,
            learning_rate=rate,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            seed=seed,
            use_cpu=on_cpu,
            bf16=not on_cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
            dataloader_drop_last=True,
            dataloader_pin_memory=not on_cpu,
            label_names=["labels"],
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        arguments._n_gpu = min(arguments.n_gpu, 1)  # Trainer would give each GPU of the machine a batch of its own
        rows: Any = [{"input_ids": ids, "labels": ids} for ids in blocks]
        trainer = prepared.trainer_class(
            model, arguments, data_collator=default_data_collator, train_dataset=rows, callbacks=[clock]
        )
        trainer.remove_callback(PrinterCallback)
        can_tell = _reset_peak(model.device)
        trainer.train()
        peak = _peak_bytes(model.device) if can_tell else None
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # `forward` is the model's own again
    steps = trainer.state.global_step
    return {
        "steps": steps,
        "tokens": steps * batch_size * len(blocks[0]),
        "seconds": round(clock.elapsed, 2),
        "peak_bytes": peak,
    }


def _reset_peak(device: torch.device) -> bool:
    """Have the peak of memory counted from here on; return whether the platform can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return device.type == "cpu"


def _peak_bytes(device: torch.device) -> int:
    """Return the peak of memory since then."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
