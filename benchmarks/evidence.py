"""Make every result, table and picture of the documentation: make evidence, make evidence-quick.

    python benchmarks/evidence.py            # what is not in benchmarks/results yet: days on two cores
    python benchmarks/evidence.py --quick    # a small form of every script, kept nowhere: a quarter of an hour
    python benchmarks/evidence.py --list     # the scripts, with the hours that each takes

Scripts whose results consist of many runs go on where they stopped; others run if their results file is not there. So
to measure something again, delete its file. At the end the answers and tables are written into the documentation.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from methods import device
from texts import ROOT

BENCHMARKS = ROOT / "benchmarks"
sys.path[:0] = [str(BENCHMARKS / "paper"), str(ROOT / "examples")]
import demo  # noqa: E402 (from these folders)
from bases import GEMMA, SHAPES  # noqa: E402


@dataclass(frozen=True)
class Script:
    """A script, and how to run it.

    Args:
        name: File below `benchmarks/`, without its ending.
        hours: What it takes on two cores.
        options: Of its full form.
        small: Options of its small form; `None`: it has none beside that of an entry above.
        results: Name of its results file, if it is not the script's.
        goes_on: Whether it knows which of its runs are done.
        on_gpu: Whether it is left out where there is no GPU.
        package: It is left out where this is not installed.
    """

    name: str
    hours: float
    options: tuple[str, ...] = ()
    small: tuple[str, ...] | None = ("--quick",)
    results: str = ""
    goes_on: bool = False
    on_gpu: bool = False
    package: str = ""

    def __str__(self) -> str:
        return " ".join((self.name, *self.options))

    @property
    def can_run(self) -> bool:
        """Whether what it needs is here."""
        is_installed = not self.package or importlib.util.find_spec(self.package) is not None
        return is_installed and (device() == "cuda" or not self.on_gpu)

    def command(self, folder: Path, small: bool) -> list[str]:
        """What to run; results go into the folder."""
        file = folder / f"{self.results or self.name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        options = (self.small or ()) if small else self.options
        return [sys.executable, str(BENCHMARKS / f"{self.name}.py"), "--output", str(file), *options]

    def is_done(self, folder: Path) -> bool:
        """Whether there is nothing left to do."""
        return not self.goes_on and (folder / f"{self.results or self.name}.json").exists()


QUESTIONS = ("position", "transfer", "several_organs", "against_lora", "cross_domain", "encoders")  # one uses another
OTHER_BASES: dict[str, tuple[float, tuple[str, ...]]] = {  # hours for a question, and options
    **dict.fromkeys(SHAPES, (0.5, ())),
    "gemma": (2, ("--seeds", "1")),  # runs of many minutes each
}
AT_ONCE = 2  # small forms
PACKAGES = {"gemma": GEMMA.replace("-", "_")}  # which not every installation has
SCRIPTS = (
    Script("extract", 0.1),
    Script("extract", 0.05, ("--experts",), ("--experts", "--quick"), "extract-experts"),
    Script("runtime", 0.3),
    Script("prefill", 0.1),
    Script("sweep", 0.3),
    Script("lora_export", 0.3),
    Script("lora_export", 0.1, ("--only", "deltas"), None, "lora_export-deltas"),
    Script("scaffold", 0.5),
    Script("spans", 2),
    Script("train", 4, small=("--smoke",), goes_on=True),
    Script("train", 1, ("--broad",), None, "train-broad", goes_on=True),
    Script("train", 0.5, ("--replay",), None, "train-replay", goes_on=True),
    Script("train", 1.5, ("--long",), None, "train-long", goes_on=True),
    Script("train", 0.2, ("--gpu",), None, "train-gpu", goes_on=True, on_gpu=True),
    Script("recall", 6, small=("--smoke",), goes_on=True),
    *(Script(f"paper/{name}", 1, goes_on=True) for name in QUESTIONS),
    *(
        Script(f"paper/{name}", hours, ("--base", base, *more), None, goes_on=True, package=PACKAGES.get(base, ""))
        for name in QUESTIONS
        if name != "encoders"  # has models of its own
        for base, (hours, more) in OTHER_BASES.items()
    ),
    Script("privacy", 1, small=("--smoke",), goes_on=True),
    Script("organs", 1, ("--cards", str(ROOT / "model_cards")), ("--smoke",), goes_on=True),
)


def main(arguments: list[str] | None = None) -> int:
    """Run the scripts one after the other; the number of those that failed."""
    parser = argparse.ArgumentParser(description="Make every result, table and picture of the documentation.")
    parser.add_argument("--quick", action="store_true", help="a small form of every script, kept nowhere")
    parser.add_argument("--list", action="store_true", help="print the scripts and stop")
    parser.add_argument("--only", nargs="+", choices=list(dict.fromkeys(script.name for script in SCRIPTS)))
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) if options.quick else BENCHMARKS / "results"
        left = [each for each in SCRIPTS if not options.only or each.name in options.only]
        left = [each for each in left if not each.is_done(folder) and each.can_run]
        left = [each for each in left if not options.quick or each.small is not None]
        if options.list:
            print(*(f"{each}: {each.hours:g} h" for each in left), sep="\n")
            return 0
        if options.quick:
            demo.unpack_base(Path.home() / ".cache" / "not_hf")  # here, since two scripts would do so side by side
        failed = run_all(left, folder, options.quick)
    if not options.quick:
        subprocess.run([sys.executable, str(BENCHMARKS / "tables.py")], check=True)
    return failed


def run_all(scripts: list[Script], folder: Path, small: bool) -> int:
    """Run, with a line for each script that says how much time is left; the number of those that failed.

    Small forms, whose times nobody reads, run side by side with one thread each.
    """
    start = time.monotonic()
    shares = [1.0 if small else each.hours for each in scripts]  # small forms take about as long as each other
    done: list[float] = []  # the shares of those that ended
    failed: list[Script] = []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} if small else None

    def run(n: int, script: Script, share: float) -> None:
        minutes = (time.monotonic() - start) / 60
        left = f", about {minutes * (sum(shares) / sum(done) - 1):.0f} minutes left" if done else ""
        print(f"{n} of {len(scripts)}: {script}{left}", flush=True)
        command = script.command(folder, small)
        ended = subprocess.run(command, check=False, capture_output=small, text=True, env=environment)
        if ended.returncode:
            failed.append(script)
            print(f"{script} failed ({ended.returncode})", (ended.stderr or "")[-2000:], sep="\n", file=sys.stderr)
        done.append(share)

    with ThreadPoolExecutor(AT_ONCE if small else 1) as pool:
        list(pool.map(run, itertools.count(1), scripts, shares))
    minutes = (time.monotonic() - start) / 60
    print(f"{len(scripts) - len(failed)} of {len(scripts)} done in {minutes:.0f} minutes")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
