"""The benchmarks in their small form."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc"),
]


def quick(name: str, folder: Path) -> tuple[str, dict]:
    """What a benchmark's small form prints, and its numbers."""
    command = [sys.executable, BENCHMARKS / name, "--quick", "--output", folder / "found.json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((folder / "found.json").read_text())


def test_extract(tmp_path):
    """A cut from the Hub serves and holds little more than the organ; the second one reads nothing."""
    printed, found = quick("extract.py", tmp_path)
    assert "served / organ" in printed
    ways = found["ways"]
    assert ways["range"]["organ_bytes"] > 60e6
    assert 1 <= ways["range"]["bytes_per_organ_byte"] <= 1.02
    assert ways["again"]["bytes_served"] < 5_000  # the commit that the branch is at
    assert all(ways[way]["memory_per_organ_byte"] <= 1.2 for way in ("range", "again", "folder"))
    assert ways["whole"]["bytes_per_organ_byte"] > 2


def test_runtime(tmp_path):
    """Bounds that a busy machine keeps, and an engine ten times slower would not."""
    printed, found = quick("runtime.py", tmp_path)
    assert "| `set_donor` |" in printed
    assert found["decode"]["ratio"] > 0.5
    (loading,) = found["load"].values()
    assert loading["memory_ratio"] < 1.2 and loading["seconds_per_base"] < 5
    assert loading["native_bytes"] == loading["transplanted_bytes"] > loading["base_bytes"]
    assert all(loading[f"{way}_seconds_until_read"] > loading[f"{way}_seconds"] for way in ("base", "transplanted"))
    assert [each["target"] for each in found["targets"]] == [">= 0.99", "<= 1.10", "<= 1.05", "<= 5.00"]
    assert all(f"| {each['what']} | {each['target']} |" in printed for each in found["targets"])
    seconds = found["switch"]["seconds"]
    assert max(seconds["set_donor"], seconds["disable_donors"]) < 0.03


def test_encoders(tmp_path):
    """Every method trains on both encoders; an organ trains fewer parameters than the whole model."""
    _, found = quick("encoders.py", tmp_path)
    for methods in found["encoders"].values():
        base, replace = methods["base"], methods["organ, replace"]
        assert replace["domain_at_start"] == base["domain"]
        assert replace["domain"] != base["domain"]
        assert 0 < replace["trained"] < methods["full"]["trained"]
    assert methods["organ, insert"]["domain_at_start"] == base["domain"]  # ModernBERT's starts as a no-op
