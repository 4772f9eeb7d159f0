"""Processes that find torch imported already: Python programs as `subprocess` runs them, seconds sooner, and forks."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import types
import warnings
from collections.abc import Callable
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path

# What transformers imports of others. None of these imports huggingface_hub, which reads its settings then.
_PRELOADED = [
    *("torch", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor", "numpy", "pandas"),
    *("scipy.optimize", "pyarrow.dataset", "jinja2.sandbox", "tokenizers", "safetensors.torch", "yaml", "PIL.Image"),
]


def prepared_context() -> BaseContext:
    """Starts processes that have imported what transformers needs of others, and nothing else; on Windows, nothing."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def start_python(*command: str | Path, output: Path, cwd: Path | None = None, **environment: str) -> BaseProcess:
    """Start what `python *command` would run: `-c CODE`, `-m MODULE` or the path of a script, and arguments.

    Args:
        command: What stands behind `python`.
        output: A folder for the files `stdout` and `stderr`.
        cwd: Where it starts.
        environment: Variables beside those of this process.
    """
    process = prepared_context().Process(target=_run, args=_given(command, output, cwd, environment))
    process.start()
    return process


def run_python(
    *command: str | Path, cwd: Path | None = None, warm: bool = False, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run what `python *command` would, as `start_python` starts it, for four minutes at most.

    Args:
        command: What stands behind `python`.
        cwd: Where it starts.
        warm: Whether it is a fork of this process, with all that is imported here, and what modules have read.
        environment: Variables beside those of this process.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder)
        if warm:
            process = forked(_run, *_given(command, output, cwd, environment))
        else:
            process = start_python(*command, output=output, cwd=cwd, **environment)
        process.join(240)
        if process.exitcode is None:
            process.kill()
        process.join()
        stdout, stderr = ((output / name).read_text("utf-8") for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess(command, process.exitcode, stdout, stderr)


def forked(work: Callable[..., object], *arguments: object) -> BaseProcess:
    """Start some work in a fork of this process."""
    process = multiprocessing.get_context("fork").Process(target=_without_bars, args=(work, *arguments))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This process", DeprecationWarning)  # forks beside threads that wait
        process.start()
    return process


def _without_bars(work: Callable[..., object], *arguments: object) -> None:
    """Progress bars have a lock between processes, which one that is killed would keep."""
    from transformers.utils.logging import (
        disable_progress_bar,  # not where `_run` comes from: it imports the Hub's client
    )

    disable_progress_bar()
    work(*arguments)


def _given(
    command: tuple[str | Path, ...], output: Path, cwd: Path | None, environment: dict[str, str]
) -> tuple[list[str], str, str, dict[str, str]]:
    """The arguments of `_run`, all of which can be pickled; the files of its output are there."""
    for name in ("stdout", "stderr"):
        Path(output, name).touch()
    return [*map(str, command)], str(output), str(cwd or Path.cwd()), {**os.environ, **environment}


def _run(command: list[str], output: str, cwd: str, environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    tempfile.tempdir = None  # that of the environment
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{output}/{name}", os.O_WRONLY), descriptor)
        setattr(sys, name, open(descriptor, "w", buffering=1, closefd=False, encoding="utf-8"))  # noqa: SIM115
    kind, *sys.argv = command if command[0].startswith("-") else ["", *command]
    if kind == "-c":
        code, sys.argv[0] = sys.argv[0], "-c"
        sys.path.insert(0, "")
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(code, "<string>", "exec"), main.__dict__)
    elif kind == "-m":
        sys.path.insert(0, cwd)
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(sys.argv[0]).parent))
        runpy.run_path(sys.argv[0], run_name="__main__")
