"""Trainings of two organs that are killed again and again: what comes of them is what an uninterrupted one gives."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path

from transformers import Trainer

from not_hf import DonorTrainer
from not_hf.training.checkpoints import last_complete_checkpoint
from testing.processes import forked
from testing.training import made, rows, two_organs

TRAINING = {"save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "save_total_limit": 2}
TRAINING |= {"save_strategy": "steps", "load_best_model_at_end": True, "metric_for_best_model": "loss"}
TRAINING |= {"greater_is_better": True}  # the best is an early one, from before most kills
LAST = {DonorTrainer: 4, Trainer: 3}  # step; within an epoch, Trainer takes one more if it resumes there
STEPS = 300  # of a life in which files are opened, moved or deleted; a save has about 110


def train(folder: Path, cls: type[Trainer], kill_at: int | None = None) -> None:
    """Train from the last whole checkpoint on, with dropout; kill this process at a step, if one is given."""
    if kill_at is not None:
        _kill_this_process(folder, kill_at)
    options = {**TRAINING, "max_steps": LAST[cls], **({"cache_prefix": True} if cls is DonorTrainer else {})}
    trainer = made(two_organs("gpt2"), folder, cls=cls, eval_dataset=rows(2), **options)
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder / "run"))
    trainer.save_model(str(folder / "best"))


def kill_trainings(times: int, folder: Path, cls: type[Trainer] = DonorTrainer, seed: int = 0) -> Counter[str]:
    """Kill a training at random steps, so many times, each life going on where the last one ended."""
    found, chance = Counter[str](), random.Random(seed)
    train(folder / "whole", cls)
    expected = results(folder / "whole", LAST[cls])
    for life in range(times + 1):
        process = forked(train, folder / "killed", cls, chance.randrange(STEPS) if life < times else None)
        process.join(120)
        if process.exitcode == -signal.SIGKILL:
            found["killed"] += 1
            continue
        same = process.exitcode == 0 and results(folder / "killed", LAST[cls]) == expected
        found["same" if same else f"another error ({process.exitcode})"] += 1
        shutil.rmtree(folder / "killed")
    return found


def results(folder: Path, last: int) -> dict[str, bytes]:
    """What a training leaves of its organs: weights and configs of the last checkpoint and of the best."""
    kept = [folder / "run" / f"checkpoint-{last}", folder / "best"]
    files = [file for each in kept for file in each.rglob("*") if file.suffix == ".safetensors"]
    files += [file for each in kept for file in each.rglob("config.json")]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def _kill_this_process(folder: Path, at: int) -> None:
    """Kill this process the n-th time that it opens, moves or deletes something in a folder."""
    left = at

    def count(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        if any(isinstance(each, str) and each.startswith(str(folder)) for each in arguments):
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
