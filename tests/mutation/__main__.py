"""`make mutation`: which mutants of not_hf the tests kill.

Each mutant runs against the tests that execute its lines: those of the module's own test file first, then those of its
folder, then the others, the quickest first, within a limit of seconds. Mutants are made by mutmut's operators. Tests
that are marked as slow are left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from coverage import CoverageData

from mutation.mutants import Mutant, mutants_of, sample
from mutation.runner import Runner

_SLACK = 20  # seconds that a mutant may take beyond three times what its tests took before
_LEFT_OUT = ("docs", "faults", "fuzz", "local_hub", "soak")  # folders of tests


def main() -> int:
    """Run a sample, print the counts of each folder. Returns the exit status: 1 if fewer than 85 % were killed."""
    parser = argparse.ArgumentParser(prog="python -m mutation", description=__doc__)
    parser.add_argument("--folders", nargs="+", default=["architecture", "donor", "recipient", "hub"])
    parser.add_argument("--sample", type=int, default=300, help="mutants to try (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=30, help="of tests for each mutant (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="a folder for the results; a later run continues what it holds")
    parser.add_argument("--tests", nargs="+", default=["tests"], help="try these only (default: all quick ones)")
    parser.add_argument("--mutants", nargs="+", help="try these only, by their names in the results")
    options = parser.parse_args()

    found = {path: mutants_of(path) for name in options.folders for path in sorted(Path("not_hf", name).glob("*.py"))}
    chosen = sample(found, options.sample, options.seed)
    if options.mutants:
        chosen = [mutant for mutants in found.values() for mutant in mutants if mutant.name in options.mutants]
    if not chosen:
        parser.error("no such mutants; take names of the same commit")
    print(f"{len(chosen)} of {sum(map(len, found.values())):,} mutants, seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        output = options.output or Path(folder, "output")
        output.mkdir(exist_ok=True)
        runner = Runner(Path(folder))
        covered = [f"--cov=not_hf/{name}" for name in options.folders]
        tests_of = _tests(runner, output, covered, options.tests, options.seconds)
        with (output / "results.jsonl").open("a+") as file:
            file.seek(0)
            results = {result["mutant"]: result for result in map(json.loads, file)}
            for mutant in chosen:
                if mutant.name not in results:
                    results[mutant.name] = _try(runner, mutant, tests_of(mutant))
                    print(json.dumps(results[mutant.name]), file=file, flush=True)
    return _show(results.values())


def _try(runner: Runner, mutant: Mutant, tests: dict[str, float]) -> dict[str, Any]:
    """Run the tests of a mutant. Returns how that ended: killed, timeout, survived, or untested."""
    result = {"mutant": mutant.name, "change": mutant.change(), "tests": len(tests), "end": "untested", "by": ""}
    if tests:
        place = runner.repo / mutant.path
        Path(importlib.util.cache_from_source(place)).unlink(missing_ok=True)
        place.write_text(mutant.source)
        status, report = runner.run(["-x", *tests], 3 * sum(tests.values()) + _SLACK)
        place.write_text(mutant.module.code)
        result["end"] = "timeout" if status is None else "killed" if status else "survived"
        result["by"] = next((f"{name}: {why}" for name, why in report.get("failed", {}).items()), f"status {status}")
    return result


def _tests(
    runner: Runner, output: Path, covered: list[str], paths: list[str], limit: float
) -> Callable[[Mutant], dict[str, float]]:
    """Run the suite without mutants, unless an earlier run has left what came of it in `output`.

    Returns:
        A function that says which tests a mutant is tried with, and the seconds that each takes.
    """
    suite = ["-m", "not slow", *(f"--ignore=tests/{name}" for name in _LEFT_OUT), *paths]
    runner.preload(["huggingface_hub", "torch", "transformers", "datasets"])
    runner.preload(runner.run(["--collect-only", *suite], 600, keep_bytecode=True)[1]["modules"])
    if not (output / "report.json").exists():
        _run_suite(runner, [*covered, *suite], output)
    report, data = json.loads((output / "report.json").read_text()), CoverageData(output / "coverage")
    data.read()
    runner.preload(report["modules"])
    seconds = {name: taken for name, taken in report["seconds"].items() if name not in report["failed"]}
    print(f"{len(seconds):,} tests, {sum(seconds.values()):.0f} s", flush=True)
    for name, why in report["failed"].items():
        print(f"left out, as it fails without mutants: {name}: {why}", flush=True)
    measured = {Path(*Path(file).parts[-3:]): file for file in data.measured_files()}

    def tests_of(mutant: Mutant) -> dict[str, float]:
        contexts = data.contexts_by_lineno(measured[mutant.path])
        at = [contexts[line] for line in range(mutant.lines[0], mutant.lines[1] + 1) if line in contexts]
        tests = _names(at)
        if at and not tests:  # executed once, at import
            tests = _names(contexts.values()) or set(seconds)
        folder = f"tests/{mutant.path.parent.name}/"
        own = f"{folder}test_{mutant.path.name}"

        def order(name: str) -> tuple[bool, bool, float]:
            return not name.startswith(own), not name.startswith(folder), seconds[name]

        return _first(sorted(tests & seconds.keys(), key=order), seconds, limit)

    return tests_of


def _run_suite(runner: Runner, suite: list[str], output: Path) -> None:
    os.environ["COVERAGE_FILE"] = str(runner.scratch / "coverage")
    status, report = runner.run(["--cov-report=", "--cov-context=test", *suite], 3600)
    if status not in (0, 1):
        sys.exit(f"the suite without mutants ended with status {status}:\n{runner.log.read_text()[-3000:]}")
    shutil.copy(runner.scratch / "coverage", output)
    report["modules"] = [name for name in report["modules"] if name.startswith("transformers.models.")]
    (output / "report.json").write_text(json.dumps(report))


def _names(contexts: Iterable[Iterable[str]]) -> set[str]:
    return {name.rpartition("|")[0] for names in contexts for name in names} - {""}


def _first(ordered: list[str], seconds: dict[str, float], limit: float) -> dict[str, float]:
    """Take the first tests within a limit, file by file: a module's fixtures cannot be set up twice."""
    chosen: dict[str, list[str]] = {}
    for name in ordered:
        if (limit := limit - seconds[name]) < 0:
            break
        chosen.setdefault(name.partition("::")[0], []).append(name)
    return {name: seconds[name] for names in chosen.values() for name in names}


def _show(results: Iterable[dict[str, Any]]) -> int:
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for result in results:
        if result["end"] in ("survived", "untested"):
            print(f"{result['end']:9} {result['mutant']}  {result['change']:.300}")
        for name in (Path(result["mutant"]).parent.name, "all"):
            counts[name][result["end"]] += 1
    for name, ends in sorted(counts.items(), key=lambda item: item[1].total()):
        share = (ends["killed"] + ends["timeout"]) / ends.total()
        print(f"{name:14}{ends.total():5} mutants, {share:6.1%} killed: {dict(ends)}")
    return int(share < 0.85)


if __name__ == "__main__":
    sys.exit(main())
