"""Faults by the thousand: `make faults` injects them and counts what was found afterwards."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny

import torch
from transformers import Trainer

from faults.saves import fill_disk, interrupt_saves, kill_saves
from faults.trainings import kill_trainings
from not_hf import DonorTrainer
from testing.changes import OPERATIONS, try_interrupts

LOST = ("mixture", "neither", "told", "another error")


def main(arguments: list[str] | None = None) -> int:
    """Print each kind of fault with its counts; 1 if anything was lost."""
    parser = argparse.ArgumentParser(prog="make faults", description="Kill, interrupt and starve what changes things.")
    parser.add_argument(
        "--times", type=int, default=1000, help="kills of saves, and saves on a full disk; a tenth of trainings"
    )
    parser.add_argument("--points", type=int, help="interrupts of each operation; default: at every step")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    total: Counter[str] = Counter()

    def tell(kind: str, found: Counter[str] | dict[str, int]) -> None:
        total.update(found)
        print(f"{kind:44s} {sum(found.values()):6,d}  {dict(found)}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        tell("SIGKILL during a save", kill_saves(options.times, Path(folder, "killed")))
        tell("a disk that is full during a save", fill_disk(options.times, Path(folder, "full")))
        tell("Ctrl-C during a save", interrupt_saves(options.points, Path(folder, "interrupted")))
        for cls in (DonorTrainer, Trainer):
            found = kill_trainings(options.times // 10, Path(folder, cls.__name__), cls)
            tell(f"SIGKILL during a training ({cls.__name__})", found)
    for operation in OPERATIONS:
        tell(f"Ctrl-C in {operation}", try_interrupts(operation, options.points))
    lost = {kind: count for kind, count in total.items() if count and kind.startswith(LOST)}
    print(f"{total.total():,} faults; lost or mixed up: {lost or 'nothing'}", flush=True)
    command = [sys.executable, "-m", "pytest", "-q", "-k", "kill or interrupt or break or full", "tests"]
    print("\nKilled pushes, downloads, cuts, trainings, caches (part of the suite):", flush=True)
    return int(bool(lost)) or subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
