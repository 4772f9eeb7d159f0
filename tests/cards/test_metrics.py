"""What of a trainer's log is a perplexity."""

from __future__ import annotations

import math

import pytest

from not_hf.cards.donor import donor_card
from not_hf.cards.metrics import drop_measured_before, organ_metrics, perplexities
from testing.cards import make_config


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


def test_results_of_perplexity_become_metrics_and_a_card():
    ends = {"perplexity": (17.0, 19.0), "nats_per_token": (2.8, 2.9), "bits_per_byte": None}
    after = {"perplexity": 18.0, "nats_per_token": 2.89, "bits_per_byte": 0.9, "confidence_interval": ends}
    before = {"perplexity": 24.0, "num_tokens": 9}
    on = {"text": "held-out.txt", "num_tokens": 9, "window": 8}
    metrics = organ_metrics({"before": before, "after": after}, on, "control_")
    assert metrics == {
        "control_perplexity": {
            **{"before": 24.0, "after": 18.0},
            **{"confidence_interval": {"after": [17.0, 19.0]}, "measured_on": on},
        },
        "control_bits_per_byte": {"after": 0.9, "measured_on": on},
    }
    card = donor_card(make_config(metrics=metrics))
    assert "| control perplexity | 24 | 18 | -25.0 % |\n| control bits per byte | – | 0.9 | – |\n" in card.text
    assert (
        "- control perplexity: 9 tokens of held-out.txt, 8 tokens at a time; 95 % interval 17–19 after\n" in card.text
    )
    assert "- control bits per byte: 9 tokens of held-out.txt, 8 tokens at a time\n" in card.text
    (result,) = card.data.to_dict()["model-index"][0]["results"]
    assert result["dataset"]["name"] == "control"
    assert [(each["type"], each["value"]) for each in result["metrics"]] == [
        ("perplexity", 18.0),
        ("bits_per_byte", 0.9),
    ]


def test_only_what_was_measured_before_is_dropped():
    old = {"metrics": {"perplexity": {"after": 2.0}}, "best_position": {"position": 1, "mode": "insert", "rows": 9}}
    new = {"metrics": {"perplexity": {"after": 1.5}}, "best_position": {"position": 2, "mode": "insert", "rows": 9}}
    place = {"position": 1, "mode": "insert"}
    for now, kept in ((old, (None, place)), (new, tuple(new.values())), ({"metrics": None}, (None, None))):
        config = make_config(**now)
        assert drop_measured_before(config, make_config(**old)) == (now is old)
        assert (config.metrics, config.best_position) == kept


@pytest.mark.parametrize("wrong", [{"after": 3}, {"after": [1.0]}, {"after": ["a", "b"]}, [1.0, 2.0], None])
def test_what_is_no_interval_is_not_shown(wrong):
    metrics = {"perplexity": {"after": 2.0, "confidence_interval": wrong, "measured_on": {"text": "a"}}}
    assert "- perplexity: a\n" in donor_card(make_config(metrics=metrics)).text
