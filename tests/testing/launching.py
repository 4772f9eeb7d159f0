"""Running examples/train_distributed.py in real processes, and what it leaves behind."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from not_hf import TransplantedForCausalLM
from testing import EXAMPLES, ROOT
from testing.processes import run_python

EXAMPLE = str(EXAMPLES / "train_distributed.py")
ON_CPU = str(ROOT / "tests" / "testing" / "cpu_as_accelerator.py")
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]


def accelerate(config: str) -> list[str]:
    """Arguments of `accelerate launch` with a shipped config."""
    path = str(EXAMPLES / "accelerate" / config)
    return ["-m", "accelerate.commands.launch", "--config_file", path, "--main_process_port=0"]


def train(launcher: Sequence[str], base: Path, output: Path, *options: str, batch_size: int = 2) -> None:
    """Four steps on two processes (or on one, without launcher and with twice the batch)."""
    text = output.parent / "text.txt"
    text.write_text("\n".join(" ".join(f"w{3 + (s + n) % 90}" for n in range(29)) for s in range(0, 90, 3)))
    arguments = ["--base", base, "--layers", "1", "3", "--text", text, "--output", output, "--batch-size", batch_size]
    arguments += ["--block-length", "16", "--steps", "4", "--save-steps", "2", "--learning-rate", "5e-3", *options]
    environment = {
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
    }
    command = [*launcher, EXAMPLE, *map(str, arguments)]
    done = run_python(*command, cwd=ROOT, **environment)
    assert done.returncode == 0, done.stderr[-3000:]


def difference(ours: Path, theirs: Path) -> float:
    """Largest difference of two organs' tensors, which have equal names and shapes."""
    mine, other = (load_file(folder / "model.safetensors") for folder in (ours, theirs))
    assert {name: t.shape for name, t in mine.items()} == {name: t.shape for name, t in other.items()}
    return max(float((tensor - other[name]).abs().max()) for name, tensor in mine.items())


def answer(model: TransplantedForCausalLM, ids: torch.Tensor, queue: multiprocessing.Queue) -> None:
    """What a spawned process runs: put the logits with all organs and with none, `(batch, seq, vocab)`."""
    torch.set_num_threads(1)
    with torch.no_grad(), model.disable_donors():
        base = model(ids).logits
    with torch.no_grad():
        queue.put((model(ids).logits.numpy(), base.numpy()))
