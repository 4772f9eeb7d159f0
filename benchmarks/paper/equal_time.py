"""What `train.py` found at equal time on SmolLM2, for the questions that it answers in part; nothing is run again."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

from question import Runs, spread

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
from figures import OUTPUTS, read  # noqa: E402
from methods import REFERENCE  # noqa: E402 (from the folder above, like the next)


def runs_of(method: str) -> dict[str, Runs]:
    """The runs of a method by the text that it was trained on."""
    found: dict[str, Runs] = {}
    for run in read("train")["comparison"]:
        if run["method"] == method:
            found.setdefault(run["domain"], []).append(run)
    return found


def learned(domain: str) -> str:
    """Perplexities of a text after training on it, of organ and LoRA at the best rate and scale of each."""

    def perplexities(runs: Runs) -> str:
        return spread([math.exp(run["losses"][f"{run['scale']:g}"]["domain"]) for run in runs])

    sides = (f"{method} {perplexities(runs_of(method)[domain])}" for method in (OUTPUTS, REFERENCE))
    return f"At equal time (`train.py`): {', '.join(sides)}."


def forgotten() -> str:
    """Loss of the organ less LoRA's on a general text, scaled to equal gain on what they were trained on."""

    def difference(run: dict[str, Any]) -> float:
        return run["equal"]["control"] - run["equal"]["control_of_reference"]

    sides = (f"{domain} {spread([difference(run) for run in runs], 3)}" for domain, runs in runs_of(OUTPUTS).items())
    return f"At equal time and gain (`train.py`), {OUTPUTS} − {REFERENCE} on english after {', '.join(sides)}."
