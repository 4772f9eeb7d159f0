"""A few hundred hostile files, the same each time, and all that ever ended wrongly. `make fuzz` tries thousands."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from fuzz.guard import Guard
from fuzz.run import CORPUS, run_target
from fuzz.targets import Target, make_targets

pytestmark = pytest.mark.slow

INPUTS = {
    "config": 50,
    "donor": 30,
    "composition": 20,
    "index": 80,
    "header": 80,
    "weights": 60,
    "delta": 40,
    "delta-weights": 60,
    "pickle": 60,
    "card": 40,
}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def targets(scratch: Path) -> dict[str, Target]:
    return make_targets(scratch)


@pytest.fixture(scope="module")
def guard(scratch: Path) -> Guard:
    return Guard(scratch, runs_code=True)


@pytest.mark.parametrize("name", INPUTS)
def test_a_hostile_file_ends_in_success_or_one_clear_error(name, targets, guard):
    ends, found = run_target(targets[name], guard, INPUTS[name])
    assert not found
    assert ends.total() == INPUTS[name] and len(ends) > 1  # not all alike


@pytest.mark.parametrize("file", sorted(CORPUS.rglob("*.bin")), ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_what_once_ended_wrongly_no_longer_does(file: Path, targets, guard):
    _, faults = guard.faults(lambda: targets[file.parent.name].run(file.read_bytes()))
    assert not faults


def busy(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


@pytest.mark.parametrize(
    ("run", "fault"),
    [
        (lambda: Path("/proc/none").write_text("x"), "writes '/proc/none'"),
        (lambda: __import__("os").system("true"), "os.system"),
        (lambda: __import__("subprocess").run(["true"]), "subprocess.Popen"),
        (lambda: {}["x"], "KeyError: 'x'"),
        (lambda: exec("raise ValueError"), "ValueError without a message"),
        (lambda: busy(0.3), "took 0.3 s"),
        (lambda: bytearray(b"x") * 2**29, "took 0."),
    ],
)
def test_the_guard_sees_what_it_watches(run, fault, guard, monkeypatch):
    monkeypatch.setattr("fuzz.guard.SECONDS", 0.2)
    monkeypatch.setattr("fuzz.guard.BYTES", 2**26)
    _, faults = guard.faults(run)
    assert any(each.startswith(fault) for each in faults), faults
