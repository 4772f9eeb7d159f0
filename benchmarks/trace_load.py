"""Trace one load: the files and functions of not_hf that run, calls across files, and work that is repeated.

    python benchmarks/trace_load.py    # make bench-load

A tiny Llama, two donors cut from it, and two compositions of both are on the test Hub. Each load runs twice: once to
import what it needs, then traced, with an empty download cache and no twins kept. A call across files is one that a
function of not_hf makes itself; a callback from a library does not count, nor does resuming a generator.
Comprehensions make one call per tensor, so the calls outside them are also counted apart (from Python 3.12 on, only
generator expressions have frames of their own).
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import re
import shutil
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

from extract import ROOT, serve

PACKAGE = f"{ROOT / 'not_hf'}{os.sep}"
GENERATORS = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
TINY = {
    **{"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
}


class Call(NamedTuple):
    """One call into not_hf."""

    callee: CodeType
    caller: CodeType | None  # where that is in not_hf too


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Trace every load, print the table, write the numbers."""
    parser = argparse.ArgumentParser(description="What one load runs through.")
    parser.add_argument("--output", type=Path, help="JSON file for the numbers")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch, serve(Path(scratch)) as hub:
        os.environ["HF_HOME"] = str(Path(scratch, "home"))
        import demo  # the commit, versions and hardware, as in its own results

        push(Path(scratch))
        loads = {name: trace(load, hub, Path(scratch, "home")) for name, load in calls().items()}
        found = {"loads": loads, "commit": demo.commit(), **demo.provenance(__file__)}
    print(table(loads))
    if options.output:
        options.output.write_text(json.dumps(found, indent=2) + "\n")
    return found


def push(scratch: Path) -> None:
    """Push a tiny Llama, two donors, and compositions of both: one that holds them, one that names their repos."""
    import torch
    from huggingface_hub import HfApi
    from transformers import AutoConfig, AutoModelForCausalLM

    from not_hf import DonorModel, TransplantedForCausalLM, compose

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **TINY)).push_to_hub("me/base")
    DonorModel.from_base("me/base", layers=(1, 3)).push_to_hub("me/kjv")
    DonorModel.from_base("me/base", layers=(0, 1), mode="replace").push_to_hub("me/law")
    model = TransplantedForCausalLM.from_pretrained("me/base", "me/kjv", donor_name="kjv")
    model.load_donor("me/law", "law")
    model.push_to_hub("me/both")
    compose(["me/kjv", "me/law"]).save_pretrained(scratch / "listed")
    HfApi().create_repo("me/listed")
    HfApi().upload_folder(repo_id="me/listed", folder_path=scratch / "listed")


def calls() -> dict[str, Callable[[], Any]]:
    """The loads to trace."""
    from not_hf import DonorModel, TransplantedForCausalLM

    load = TransplantedForCausalLM.from_pretrained
    return {
        "from_pretrained(base, donor)": lambda: load("me/base", "me/kjv"),
        "from_pretrained(donor)": lambda: load("me/kjv"),
        "from_pretrained(composition)": lambda: load("me/both"),
        "from_pretrained(composition by reference)": lambda: load("me/listed"),
        "from_base(base)": lambda: DonorModel.from_base("me/base", layers=(1, 3)),
    }


def trace(load: Callable[[], Any], hub: Any, home: Path) -> dict[str, Any]:
    """Run a load twice and count what the second one does."""
    from not_hf.architecture.twin import _twins

    load()
    shutil.rmtree(home)
    home.mkdir()
    _twins.clear()
    hub.requests.clear()
    recorded, configs = record(load)
    asked = re.findall(r"^/api/models/(\S+)$", "\n".join(each.path for each in hub.requests), re.MULTILINE)
    return {
        **summary(recorded),
        "reads of one config.json, at most": configs,
        "requests for the commit of one repo, at most": Counter(asked),
        "requests": len(hub.requests),
    }


def record(load: Callable[[], Any]) -> tuple[list[Call], Counter[str]]:
    """Calls into not_hf, in this thread and those that it starts, and how often each downloaded config is opened."""
    recorded: list[Call] = []
    opened: list[str] = []

    def see(frame: FrameType, event: str, argument: Any) -> None:
        code, back = frame.f_code, frame.f_back
        if event != "call" or not code.co_filename.startswith(PACKAGE):
            return
        # the operand of RESUME is 0 only where a generator begins
        if code.co_flags & GENERATORS and code.co_code[frame.f_lasti + 1] & 3:
            return
        inside = back is not None and back.f_code.co_filename.startswith(PACKAGE)
        recorded.append(Call(code, back.f_code if inside else None))

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            opened.append(str(arguments[0]))

    sys.addaudithook(audit)  # cannot be removed
    threading.setprofile(see)
    sys.setprofile(see)
    try:
        load()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    cached = (re.search(r"/models--(.+?)/snapshots/\w+/((?:.+/)?config\.json)$", path) for path in opened)
    return recorded, Counter(f"{found[1].replace('--', '/')}/{found[2]}" for found in cached if found)


def summary(recorded: list[Call]) -> dict[str, Any]:
    """Count files, functions and calls."""
    from not_hf import DonorConfig
    from not_hf.architecture.twin import build, meta_twin
    from not_hf.architecture.upstream import resolve_commit
    from not_hf.composition.check import examine

    def calls_of(function: Callable[..., Any]) -> list[Call]:
        return [call for call in recorded if call.callee is function.__code__]

    across = [
        (call.caller, call.callee)
        for call in recorded
        if call.caller is not None and call.caller.co_filename != call.callee.co_filename
    ]
    pairs = {(file_of(caller), file_of(callee)) for caller, callee in across}
    return {
        "files": sorted({file_of(call.callee) for call in recorded}),
        "functions": len({call.callee for call in recorded if is_named(call.callee)}),
        "calls across files": len(across),
        "… outside comprehensions": sum(is_named(caller) for caller, _ in across),
        "… of each caller and callee once": len(set(across)),
        "pairs of files that call each other": sorted(
            pair for pair in pairs if pair < pair[::-1] and pair[::-1] in pairs
        ),
        "checks of a donor's config": len(calls_of(DonorConfig.check)),
        "calls of `resolve_commit`": len(calls_of(resolve_commit)),
        "compatibility checks": len(calls_of(examine)),
        "twins asked for": len(calls_of(meta_twin)),
        "twins built": sum(call.caller is meta_twin.__code__ for call in calls_of(build)),
    }


def file_of(code: CodeType) -> str:
    """The file of a function, below the package."""
    return code.co_filename.removeprefix(PACKAGE)


def is_named(code: CodeType) -> bool:
    """Whether code is a function that has a name, not a comprehension or a lambda."""
    return not code.co_name.startswith("<")


def table(loads: dict[str, Any]) -> str:
    """The numbers as Markdown, a column per load: the length of a list, the largest of several counts."""

    def cell(value: int | list[Any] | Counter[str]) -> int:
        if isinstance(value, Counter):
            return max(value.values(), default=0)
        return len(value) if isinstance(value, list) else value

    columns = list(loads.values())
    lines = [f"| | {' | '.join(f'`{name}`' for name in loads)} |", f"| --- |{' ---: |' * len(columns)}"]
    lines += [f"| {row} | {' | '.join(str(cell(column[row])) for column in columns)} |" for row in columns[0]]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
