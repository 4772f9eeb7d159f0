"""Measurements in processes of their own, which find torch and what else transformers imports imported already."""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# None of these imports huggingface_hub, which reads its settings then.
PRELOADED = ["torch", "torch._dynamo", "torch.distributed.tensor", "scipy.optimize", "tokenizers", "safetensors.torch"]


def run_apart(
    measure: Callable[..., Any], *arguments: Any, ready: Callable[[], Any] = lambda: None, **environment: str
) -> Any:
    """What a function returns in a process of its own (on Linux and macOS).

    Args:
        measure: A function of a module. Its last argument is another one, which it calls once it is warm.
        arguments: The others.
        ready: What is done here at that moment, while the process waits.
        environment: Variables of the process beside those of this one.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    ours, theirs = context.Pipe()
    process = context.Process(target=_answer, args=(theirs, {**os.environ, **environment}, measure, arguments))
    process.start()
    theirs.close()
    try:
        ours.recv()
        ready()
        ours.send(None)
        return ours.recv()
    except EOFError:
        raise RuntimeError(f"{measure.__name__} of {arguments} failed") from None
    finally:
        process.join()


def _answer(
    connection: Connection, environment: dict[str, str], measure: Callable[..., Any], arguments: tuple
) -> None:
    os.environ.update(environment)

    def warm() -> None:
        connection.send(None)
        connection.recv()

    connection.send(measure(*arguments, warm))


def reset_peak() -> int:
    """Make the kernel forget the peak of this process; returns its resident memory in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def start_counting() -> Callable[[], int]:
    """Forget the peak of memory (of a GPU, if there is one); what is returned tells by how many bytes it has risen."""
    import torch

    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        return lambda: torch.cuda.max_memory_allocated() - held
    held = reset_peak()
    return lambda: memory("VmHWM") - held


def memory(key: str) -> int:
    """A line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))
