"""`make faults` in its small form."""

from __future__ import annotations

import pytest
from transformers import Trainer

from faults.saves import fill_disk, interrupt_saves, kill_saves
from faults.trainings import kill_trainings
from not_hf import DonorTrainer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:This process:DeprecationWarning"),  # forks beside threads that wait
]


def test_killed_saves(tmp_path):
    assert not kill_saves(12, tmp_path).keys() - {"old", "new", "refused"}


def test_saves_on_a_full_disk(tmp_path):
    found = fill_disk(10, tmp_path)
    assert found["old"] and not found.keys() - {"old", "new"}


def test_interrupted_saves(tmp_path):
    found = interrupt_saves(16, tmp_path)
    assert found["old"] and found["new"] and not found.keys() - {"old", "new"}


@pytest.mark.parametrize("cls", [DonorTrainer, Trainer])
def test_killed_trainings_of_two_organs(cls, tmp_path):
    found = kill_trainings(3, tmp_path, cls)
    assert found["killed"] and found["same"] and not found.keys() - {"killed", "same"}
