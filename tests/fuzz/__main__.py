"""`make fuzz`: hostile files against everything that reads a stranger's file.

Each target runs in a process of its own with a limit on its memory, off the network. Inputs that end wrongly are
written to `tests/fuzz/corpus/`, which the test suite replays: mend what they show, then commit them.
"""

from __future__ import annotations

import argparse
import json
import logging as std_logging
import os
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# Kinds of files, and how many of 100 inputs are of each; the slower ones are fewer
NAMES = {
    **{"donor": 2, "composition": 1, "weights": 4, "delta": 2, "delta-weights": 3, "pickle": 8},
    **{"config": 15, "card": 10, "index": 20, "header": 35},
}
_MEMORY = 6 * 2**30  # address space of a process: far more than an input may take, so that the machine survives it


def main() -> int:
    """Run all targets, or in a child process one of them. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000, help="of all targets together (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the inputs (default: the time)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time (default: one per core)")
    parser.add_argument("--target", action="append", choices=NAMES, help="only this one; repeat it for several")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(_run(options.target[0], options.inputs, options.seed)))
        return 0
    names = options.target or list(NAMES)
    whole = sum(NAMES[name] for name in names)
    counts = {name: -(-options.inputs * NAMES[name] // whole) for name in names}
    print(f"{sum(counts.values()):,} inputs, seed {options.seed}", flush=True)
    total = wrong = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for result in pool.map(lambda name: _child(name, counts[name], options.seed), names):
            _show(result)
            total += sum(result["ends"].values())
            wrong += len(result["found"]) + ("died" in result)
    print(f"{total:,} inputs, {wrong} of which ended wrongly")
    return bool(wrong)


def _child(name: str, num_inputs: int, seed: int) -> dict[str, Any]:
    arguments = ["--child", "--target", name, "--inputs", str(num_inputs), "--seed", str(seed)]
    settings = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
    command = [sys.executable, "-m", "fuzz", *arguments]
    done = subprocess.run(command, env={**os.environ, **settings}, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return {"name": name, "ends": {}, "found": {}, "died": done.returncode}
    return json.loads(done.stdout.splitlines()[-1])


def _run(name: str, num_inputs: int, seed: int) -> dict[str, Any]:
    from transformers.utils import logging

    from fuzz.guard import Guard
    from fuzz.run import keep, run_target
    from fuzz.targets import make_targets

    logging.disable_progress_bar()
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    start = time.perf_counter()
    std_logging.disable(std_logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TMPDIR"] = tempfile.tempdir = folder
        target = make_targets(Path(folder))[name]
        guard = Guard(Path(folder), target.runs_code)
        run_target(target, Guard(Path(folder), runs_code=True), 20)  # what is imported once
        ends, found = run_target(target, guard, num_inputs, seed)
    kept = {str(keep(name, content)): faults for content, faults in found.items()}
    seconds, memory = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"name": name, "ends": dict(ends), "found": kept, "seconds": seconds, "memory": memory}


def _show(result: dict[str, Any]) -> None:
    if "died" in result:
        print(f"{result['name']:12} its process ended with status {result['died']}", flush=True)
        return
    ends = sorted(result["ends"].items(), key=lambda end: -end[1])
    print(
        f"{result['name']:12} {sum(result['ends'].values()):7,} in {result['seconds']:5.0f} s, "
        f"at most {result['memory'] / 2**20:.1f} GiB: {', '.join(f'{count:,} {end}' for end, count in ends)}"
    )
    for file, faults in list(result["found"].items())[:20]:
        print(f"  {'; '.join(faults)[:300]}\n    {file}")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
