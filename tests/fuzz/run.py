"""Run inputs of one target, and keep those that end wrongly."""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections import Counter
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings

from fuzz.guard import Guard
from fuzz.targets import Target

CORPUS = Path(__file__).parent / "corpus"  # of inputs that once ended wrongly: a folder per target
_BATCH = 1000  # what hypothesis remembers at a time


def run_target(
    target: Target, guard: Guard, num_inputs: int, first_seed: int = 0
) -> tuple[Counter[str], dict[bytes, list[str]]]:
    """Run inputs of a target.

    Args:
        target: The target.
        guard: Watches each input.
        num_inputs: How many.
        first_seed: Of the random inputs; the same inputs come again from the same seed.

    Returns:
        How many inputs ended in what, and what is wrong with those that ended wrongly.
    """
    ends: Counter[str] = Counter()
    found: dict[bytes, list[str]] = {}

    def one(content: bytes) -> None:
        if ends.total() < num_inputs:
            end, faults = guard.faults(lambda: target.run(content))
            ends[end] += 1
            if faults:
                found[content] = faults

    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        batch = 0
        while ends.total() < num_inputs:
            options = settings(
                max_examples=min(_BATCH, num_inputs),
                phases=[Phase.generate],
                database=None,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            )
            with warnings.catch_warnings(action="ignore"):
                options(seed(first_seed + batch)(given(target.inputs)(one)))()
            batch += 1
    finally:
        logging.disable(before)
    return ends, found


def keep(name: str, content: bytes, corpus: Path = CORPUS) -> Path:
    """Write an input into the corpus, under a name made of its content."""
    file = corpus / name / f"{hashlib.sha256(content).hexdigest()[:16]}.bin"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return file
