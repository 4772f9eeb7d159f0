"""Thousands of random lives over twelve architectures, then ten thousand cycles on one model: `make soak`."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny; processes share the cores

import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from soak.cycles import run_cycles
from soak.machine import Life, made

MODEL_TYPES = (
    *("llama", "gpt2", "gemma2", "gemma3_text", "qwen2", "qwen3_moe"),
    *("gpt_oss", "opt", "gpt_neox", "olmo2", "mixtral", "phi3"),
)


def live(model_type: str, sequences: int, steps: int) -> dict[str, int]:
    """Run random lives of one architecture, and return how many sequences and operations there were."""
    torch.set_num_threads(1)
    made.clear()
    machine = type(f"Life_{model_type}", (Life,), {"model_type": model_type})
    options = {"max_examples": sequences, "stateful_step_count": steps, "deadline": None, "database": None}
    run_state_machine_as_test(machine, settings=settings(**options, suppress_health_check=list(HealthCheck)))
    return dict(made)


def main(arguments: list[str] | None = None) -> int:
    """Print what was run and held; an exception is a divergence."""
    parser = argparse.ArgumentParser(
        prog="make soak", description="The life of organs, at random and at length."
    )
    parser.add_argument("--sequences", type=int, default=3000, help="random sequences, over all architectures")
    parser.add_argument("--steps", type=int, default=20, help="operations of a sequence, at most")
    parser.add_argument("--cycles", type=int, default=10_000, help="load-switch-unload cycles")
    options = parser.parse_args(arguments)
    start, each = time.perf_counter(), -(-options.sequences // len(MODEL_TYPES))
    with ProcessPoolExecutor() as pool:
        lives = [pool.submit(live, model_type, each, options.steps) for model_type in MODEL_TYPES]
        for model_type, found in zip(MODEL_TYPES, lives, strict=True):
            print(f"{model_type:12s} {found.result()}, no divergence", flush=True)
    total = {key: sum(found.result()[key] for found in lives) for key in ("sequences", "operations")}
    print(f"{total['sequences']:,} sequences, {total['operations']:,} operations: no divergence")
    with tempfile.TemporaryDirectory() as folder:
        first, last = run_cycles(options.cycles, Path(folder))
    print(f"{options.cycles:,} cycles; held after a tenth of them and at the end: {first} {last}")
    print(f"{time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
