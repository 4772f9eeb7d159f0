"""What of a trainer's log is a perplexity."""

from __future__ import annotations

import math

import pytest

from not_hf.cards.metrics import perplexities


@pytest.mark.parametrize(
    ("logs", "found"),
    [
        ({"eval_loss": 0.0, "epoch": 1.0}, {"": 1.0}),
        ({"eval_domain_loss": 1.0, "eval_control_loss": 1000.0}, {"domain": math.e, "control": math.inf}),
        ({"loss": 1.0}, {}),
        ({"eval_loss": 0.69, "eval_rewards/margins": 0.1}, {}),  # of TRL's trainers on preferences
    ],
)
def test_what_is_a_perplexity(logs, found):
    assert dict(perplexities(logs)) == pytest.approx(found)
