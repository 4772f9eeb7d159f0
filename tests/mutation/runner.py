"""Run tests in forks of a process that has imported torch and transformers already, and hold them to a folder."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import pytest

_MEMORY = 8 * 2**30  # data of a process
_OURS = (
    "not_hf",
    "tests",
    "testing",
    "local_hub",
    "conftest",
    "mutation",
    "coverage",
    "pytest_cov",
    "_pytest",
    "test_",
)
_COPIED = (
    "not_hf",
    "tests",
    "local_hub",
    "docs",
    "examples",
    "benchmarks",
    "model_cards",
    "README.md",
    "pyproject.toml",
)
# Audit events of changes to the disk, and which of their arguments are paths
_CHANGES = {"os.mkdir": 1, "os.remove": 1, "os.rmdir": 1, "os.rename": 2, "os.truncate": 1, "shutil.rmtree": 1}


class Runner:
    """Runs pytest in forks, each on a copy of the repo in a scratch folder, the only one that they may write to.

    Args:
        scratch: An empty folder.
    """

    def __init__(self, scratch: Path) -> None:
        self.scratch = Path(os.path.realpath(scratch))
        self.repo = self.scratch / "repo"
        self.report = self.scratch / "report.json"
        self.log = self.scratch / "log"
        for name in _COPIED:
            copy = shutil.copytree if Path(name).is_dir() else shutil.copy
            self.repo.mkdir(exist_ok=True)
            copy(name, self.repo / name)
        with socket.socket() as probe:  # huggingface_hub keeps the address that it finds when it is imported
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        os.environ.update(
            HF_ENDPOINT=f"http://127.0.0.1:{self.port}",
            HF_HOME=str(self.scratch / "tmp" / "home"),
            HF_HUB_DISABLE_XET="1",
            HF_HUB_DISABLE_PROGRESS_BARS="1",
            HF_HUB_DISABLE_TELEMETRY="1",
            HOME=str(self.scratch / "tmp"),
            TMPDIR=str(self.scratch / "tmp"),
            TOKENIZERS_PARALLELISM="false",
            OMP_NUM_THREADS="1",
            PYTHONPATH=f"{self.repo}{os.pathsep}{self.repo / 'tests'}",
        )

    def preload(self, modules: list[str]) -> None:
        """Import what the tests need of others, so that no fork has to."""
        for name in modules:
            if not name.startswith(_OURS):
                with contextlib.suppress(Exception):
                    importlib.import_module(name)

    def run(
        self, arguments: list[str], limit: float, keep_bytecode: bool = False
    ) -> tuple[int | None, dict[str, Any]]:
        """Run pytest in a fork, which is killed after `limit` seconds.

        Returns:
            Its exit status, None if it was killed; and its report: the seconds of each test, what failed and why, the
            modules that are imported at the end.
        """
        self.report.unlink(missing_ok=True)
        shutil.rmtree(self.scratch / "tmp", ignore_errors=True)
        (self.scratch / "tmp").mkdir()
        sys.stdout.flush()
        if not (child := os.fork()):
            status = 70
            try:
                status = self._pytest(arguments, keep_bytecode)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        status = None
        try:
            status = _wait(child, time.monotonic() + limit)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)  # and what it started
            if status is None:
                os.waitpid(child, 0)
        report = json.loads(self.report.read_text()) if self.report.exists() else {}
        return status, report

    def _pytest(self, arguments: list[str], keep_bytecode: bool) -> int:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY, _MEMORY))
        output = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(self.repo)
        tempfile.tempdir = os.environ["TMPDIR"]
        root = os.getcwd()
        sys.path[:] = [root, os.path.join(root, "tests"), *(path for path in sys.path if path not in ("", os.curdir))]
        for name in [name for name in sys.modules if name.partition(".")[0] in ("mutation", "tests")]:
            del sys.modules[name]
        sys.dont_write_bytecode = not keep_bytecode
        self._meet_conftest()
        sys.addaudithook(self._watch)
        return pytest.main(["-q", "-p", "no:cacheprovider", *arguments], plugins=[_Report(self.report)])

    def _meet_conftest(self) -> None:
        """The suite's Hub takes our port, and its conftest does not find huggingface_hub imported before that."""
        from local_hub import Hub

        hidden, start = sys.modules.pop("huggingface_hub"), Hub.start

        def start_at_port(hub: Hub) -> Hub:
            sys.modules["huggingface_hub"] = hidden
            hub._port, Hub.start = self.port, start
            return hub.start()

        Hub.start = start_at_port

    def _watch(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) if isinstance(flags, int) else mode != "r"
            paths: tuple[Any, ...] = (path,) if writes else ()
        else:
            paths = arguments[: _CHANGES.get(event, 0)]
        for path in paths:
            if isinstance(path, str | bytes | os.PathLike):
                place = os.path.realpath(os.fsdecode(path))
                if not place.startswith((f"{self.scratch}{os.sep}", "/dev/", "/proc/")):
                    raise PermissionError(f"{event} outside of the scratch folder: {place}")


class _Report:
    """A plugin of pytest that writes down what it sees."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = {}
        self.failed: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration
        if report.failed:
            self.failed[report.nodeid] = str(getattr(report.longrepr, "reprcrash", None) or "")[-300:]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.failed[report.nodeid] = str(report.longrepr)[-300:]

    def pytest_sessionfinish(self) -> None:
        found = {"seconds": self.seconds, "failed": self.failed, "modules": sorted(sys.modules)}
        self.path.write_text(json.dumps(found))


def _wait(child: int, deadline: float) -> int | None:
    while time.monotonic() < deadline:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    return None
