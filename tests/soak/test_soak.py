"""`make soak` in its small form."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from soak.cycles import run_cycles
from soak.machine import Life

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_random_lives(model_type):
    """No operation of any sequence leaves a model that computes other than one built anew."""
    machine = type("Life", (Life,), {"model_type": model_type})
    options = {"max_examples": 3, "stateful_step_count": 10, "deadline": None, "database": None, "derandomize": True}
    run_state_machine_as_test(machine, settings=settings(**options, suppress_health_check=list(HealthCheck)))


def test_cycles_hold_nothing(tmp_path):
    first, last = run_cycles(40, tmp_path)
    assert last["files"] <= first["files"] and last["objects"] < first["objects"] + 500
