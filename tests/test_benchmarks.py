"""The benchmarks in their small form."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_extract(tmp_path):
    """A cut from the Hub serves and holds little more than the organ; the second one reads nothing."""
    command = [sys.executable, BENCHMARKS / "extract.py", "--quick", "--output", tmp_path / "found.json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "served / organ" in done.stdout
    ways = json.loads((tmp_path / "found.json").read_text())["ways"]
    assert ways["range"]["organ_bytes"] > 60e6
    assert 1 <= ways["range"]["bytes_per_organ_byte"] <= 1.02
    assert ways["again"]["bytes_served"] < 5_000  # the commit that the branch is at
    assert all(ways[way]["memory_per_organ_byte"] <= 1.2 for way in ("range", "again", "folder"))
    assert ways["whole"]["bytes_per_organ_byte"] > 2


@pytest.mark.slow
def test_encoders(tmp_path):
    """Every method trains on both encoders; an organ trains fewer parameters than the whole model."""
    command = [sys.executable, BENCHMARKS / "encoders.py", "--quick", "--output", tmp_path / "found.json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for methods in json.loads((tmp_path / "found.json").read_text())["encoders"].values():
        base, replace = methods["base"], methods["organ, replace"]
        assert replace["domain_at_start"] == base["domain"]
        assert replace["domain"] != base["domain"]
        assert 0 < replace["trained"] < methods["full"]["trained"]
    assert methods["organ, insert"]["domain_at_start"] == base["domain"]  # ModernBERT's starts as a no-op
