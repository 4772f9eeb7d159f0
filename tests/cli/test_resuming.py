"""A training goes on with the options that it was started with."""

from __future__ import annotations

import re

import pytest

from not_hf import NotHFError
from not_hf.cli.resuming import require_same_options, save_options

STARTED = {"data": "kjv.txt", "replay_data": None, "streaming": False, "block_length": 512, "lr": 2e-4, "seed": 0}


@pytest.mark.parametrize(
    ("now", "reason"),
    [
        ({"lr": 1e-3}, "--lr was 0.0002 and is 0.001;"),
        ({"block_length": 256, "seed": 1}, "--block-length was 512 and is 256, --seed was 0 and is 1;"),
        ({"data": "other.txt"}, "--data was kjv.txt and is other.txt;"),
        ({"replay_data": "general.txt"}, "--replay-data was not given and is general.txt;"),
        ({"streaming": True}, "--streaming was not given and is given;"),
    ],
)
def test_other_options_are_refused(now, reason, tmp_path):
    save_options(tmp_path, STARTED)
    with pytest.raises(NotHFError, match=f"was started with other options: {re.escape(reason)} resume it with"):
        require_same_options(tmp_path, {**STARTED, **now})


def test_the_same_options_are_not(tmp_path, monkeypatch):
    require_same_options(tmp_path, STARTED)  # nothing is known of how the training was started
    monkeypatch.chdir(tmp_path)
    save_options(tmp_path, STARTED)
    require_same_options(tmp_path, {**STARTED, "data": str(tmp_path / "kjv.txt"), "lr": 0.0002})
