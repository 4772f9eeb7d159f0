"""Runs of a benchmark, each made once, in a process of its own, and kept in a JSON file."""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from texts import ROOT

sys.path[:0] = [str(ROOT / "examples")]
import demo  # noqa: E402 (the commit, versions and hardware, as in its own results)

MADE_ON = ("versions", "hardware")  # of each run, which may have been made elsewhere than the last one


class Record:
    """The runs of a script so far; what is in the file is not run again.

    Args:
        script: File that, with `--run JSON --base FOLDER`, prints the result of one run as JSON on its last line.
        unpack: Writes the model, unless it is there, and returns its folder; called before the first run.
        path: The file, or `None`.
        alone: The function that makes a run, in this process; `None`: each has a process of its own, with one thread.
        about: What is noted of every run beside its settings, and tells it from others.
    """

    def __init__(
        self,
        script: str,
        unpack: Callable[[], Path],
        path: Path | None,
        alone: Any = None,
        about: dict[str, Any] | None = None,
    ) -> None:
        self.script, self.path, self.alone, self.about = script, path, alone, about or {}
        self.base = functools.cache(lambda: str(unpack()))
        self.summary: dict[str, Any] = json.loads(path.read_text()) if path and path.exists() else {"runs": []}
        runs, made_on = self.summary.pop("runs"), {name: self.summary.get(name) for name in MADE_ON}
        self.runs: dict[str, dict[str, Any]] = {key_of(run["given"]): {**made_on, **run} for run in runs}
        self.started, self._writing, self._unpacking = time.time(), threading.Lock(), threading.Lock()

    def __call__(self, **given: Any) -> dict[str, Any]:
        """The result of a run."""
        key = key_of({**self.about, **given})
        if key not in self.runs:
            print(f"{time.time() - self.started:7.0f} s  {key}", file=sys.stderr, flush=True)
            with self._unpacking:
                base = self.base()
            found = self.alone(base, **given) if self.alone else self._in_process(base, given)
            with self._writing:
                about = demo.provenance(self.script)
                made = {"commit": demo.commit(), **{name: about[name] for name in MADE_ON}}
                self.runs[key] = {"given": {**self.about, **given}, **made, **found}
                self.save()
        return self.runs[key]

    def _in_process(self, base: str, given: dict[str, Any]) -> dict[str, Any]:
        command = [sys.executable, self.script, "--base", base, "--run", json.dumps(given)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            raise RuntimeError(f"{key_of(given)} failed:\n{done.stderr}")
        return json.loads(done.stdout.splitlines()[-1])

    def save(self, **summary: Any) -> None:
        """Write the runs, a line each, with what is said about all of them, or was said when there were fewer."""
        self.summary |= {**demo.provenance(self.script), **summary}
        if self.path:
            runs = [
                {key: value for key, value in run.items() if key not in MADE_ON or value != self.summary[key]}
                for run in self.runs.values()
            ]
            parts = [f'"{key}": {json.dumps(value)}' for key, value in self.summary.items()]
            parts.append('"runs": [\n' + ",\n".join(map(json.dumps, runs)) + "\n]")
            half = self.path.with_suffix(".half")
            half.write_text("{\n" + ",\n".join(parts) + "\n}\n")
            half.replace(self.path)


def key_of(given: dict[str, Any]) -> str:
    """What tells a run from others."""
    return json.dumps(given, sort_keys=True)


def parser_of(description: str, forms: Iterable[str], base_help: str = argparse.SUPPRESS) -> argparse.ArgumentParser:
    """The options that benches of runs share; `forms` are their sizes, of which the first needs no option."""
    parser = argparse.ArgumentParser(description=description)
    sizes = parser.add_mutually_exclusive_group()
    first, *others = forms
    for form in others:
        sizes.add_argument(f"--{form}", dest="form", action="store_const", const=form, default=first)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs side by side, one thread each")
    parser.add_argument("--output", type=Path, help="JSON file of the runs, read and written; its picture beside it")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "not_hf", help="where the base is kept")
    parser.add_argument("--base", help=base_help)
    parser.add_argument("--run", help=argparse.SUPPRESS)  # one run, in a process of its own
    return parser


def is_one_run(options: argparse.Namespace, run_once: Callable[..., Any]) -> bool:
    """Whether this process makes one run; it is made, and its result printed, with the processor seconds of all."""
    if options.run:
        found = run_once(options.base, **json.loads(options.run))
        print(json.dumps({**found, "processor_seconds": round(time.process_time())}))
    return bool(options.run)


@contextmanager
def opened(
    script: str, options: argparse.Namespace, run_once: Callable[..., Any],
    unpack: Callable[[Path], Path] = demo.unpack_base, about: dict[str, Any] | None = None, here: bool | None = None,
) -> Iterator[tuple[Record, ThreadPoolExecutor]]:  # fmt: skip
    """The record of a bench, and the pool of its runs; with `--smoke` the base is a small one.

    Args:
        unpack: Writes the base into the cache, unless it is there, and returns its folder.
        about: As for `Record`.
        here: Whether the runs are made in this process one by one; default with `--smoke` only.
    """
    smoke = options.form == "smoke"
    here = smoke if here is None else here
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(1 if here else options.jobs) as pool:
        base = functools.partial(small_base, Path(scratch)) if smoke else functools.partial(unpack, options.cache)
        yield Record(script, base, options.output, run_once if here else None, about), pool


def small_base(folder: Path) -> Path:
    """A random Llama of six layers with a tokenizer of bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [], trainers.BpeTrainer(special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False)
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = {"vocab_size": len(alphabet) + 1, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6}
    LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4)).save_pretrained(folder)
    return folder
