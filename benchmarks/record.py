"""Runs of a benchmark, each made once, in a process of its own, and kept in a JSON file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from texts import ROOT

sys.path[:0] = [str(ROOT / "examples")]
import demo  # noqa: E402 (the commit, versions and hardware, as in its own results)


class Record:
    """The runs of a script so far; what is in the file is not run again.

    Args:
        script: File that, with `--run JSON --base FOLDER`, prints the result of one run as JSON on its last line.
        base: Folder of the model.
        path: The file, or `None`.
        alone: Whether to start a process with one thread for each run; else it is called here.
    """

    def __init__(self, script: str, base: str, path: Path | None, alone: Any = None) -> None:
        self.script, self.base, self.path, self.alone = script, base, path, alone
        kept = json.loads(path.read_text())["runs"] if path and path.exists() else []
        self.runs: dict[str, dict[str, Any]] = {key_of(run["given"]): run for run in kept}
        self.started, self._writing = time.time(), threading.Lock()

    def __call__(self, **given: Any) -> dict[str, Any]:
        """The result of a run."""
        key = key_of(given)
        if key not in self.runs:
            print(f"{time.time() - self.started:7.0f} s  {key}", file=sys.stderr, flush=True)
            found = self.alone(self.base, **given) if self.alone else self._in_process(given)
            with self._writing:
                self.runs[key] = {"given": given, "commit": demo.commit(), **found}
                self.save()
        return self.runs[key]

    def _in_process(self, given: dict[str, Any]) -> dict[str, Any]:
        command = [sys.executable, self.script, "--base", self.base, "--run", json.dumps(given)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            raise RuntimeError(f"{key_of(given)} failed:\n{done.stderr}")
        return json.loads(done.stdout.splitlines()[-1])

    def save(self, **summary: Any) -> None:
        """Write the runs, with what is said about all of them."""
        if self.path:
            document = {**demo.provenance(), **summary, "runs": list(self.runs.values())}
            half = self.path.with_suffix(".half")
            half.write_text(json.dumps(document, indent=1) + "\n")
            half.replace(self.path)


def key_of(given: dict[str, Any]) -> str:
    """What tells a run from others."""
    return json.dumps(given, sort_keys=True)
