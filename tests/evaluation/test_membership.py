"""What tells members from non-members, on numbers that are known."""

from __future__ import annotations

import numpy as np
import pytest

from not_hf.evaluation.bootstrap import two_sample_intervals
from not_hf.evaluation.membership import attack_rows, auc_and_tpr, repeated_rows
from not_hf.evaluation.token_scores import TokenScores

HOW = {"seed": 0, "level": 0.95}


def scored(means, spread=0.0, length=10):
    """Rows of that mean log-likelihood, whose least likely fifth is `spread` below it."""
    shape = np.where(np.arange(length) < length // 5, -spread, spread / 4)
    return [TokenScores(mean + shape, np.zeros(length, dtype=bool)) for mean in means]


def by_attack(rows):
    return {row["attack"]: row for row in rows}


def test_auc_is_the_share_of_pairs_in_order_and_tpr_is_at_one_per_cent():
    generator = np.random.default_rng(0)
    members, others = generator.normal(0.5, 1, 60).round(1), generator.normal(0, 1, 250).round(1)  # with ties
    (row,) = [each for each in attack_rows((scored(members), scored(others)), None, **HOW) if each["attack"] == "loss"]
    pairs = np.sign(members[:, None] - others) / 2 + 0.5
    assert row["auc"] == pytest.approx(pairs.mean())
    assert row["tpr"] == pytest.approx(np.mean([np.mean(others >= member) <= 0.01 for member in members]))
    assert row["auc_low"] < row["auc"] < row["auc_high"] and row["tpr_low"] <= row["tpr"] <= row["tpr_high"]


@pytest.mark.slow
def test_each_attack_sees_what_it_is_for():
    generator = np.random.default_rng(0)
    hardness = generator.normal(0, 3, 150)
    usual = scored(hardness), scored(hardness)
    learned = scored(hardness + 0.5), usual[1]
    found = by_attack(attack_rows(learned, usual, **HOW))
    assert list(found) == ["loss", "min-k", "reference", "control"]
    assert found["reference"]["auc"] == found["reference"]["tpr"] == 1  # what makes rows hard is taken out
    assert 0.5 < found["loss"]["auc"] < 0.7 and found["control"]["auc"] == 0.5
    uneven = scored(hardness), scored(hardness, spread=40.0)
    found = by_attack(attack_rows(uneven, None, **HOW))
    assert list(found) == ["loss", "min-k"] and found["min-k"]["auc"] == 1 and found["loss"]["auc"] < 0.6


def test_nothing_learned_is_chance():
    rows = scored(np.zeros(50)), scored(np.zeros(100))
    assert all((row["auc"], row["tpr"]) == (0.5, 0) for row in attack_rows(rows, rows, **HOW))


@pytest.mark.slow
def test_intervals_cover_the_truth_about_as_often_as_they_say():
    truth, covered = 0.7602, 0  # P(N(1, 1) > N(0, 1)) = Φ(1 / √2)
    for seed in range(100):
        generator = np.random.default_rng(seed)
        rows = generator.normal(1, 1, 100), generator.normal(0, 1, 100)
        (low, _), (high, _) = two_sample_intervals(auc_and_tpr, *rows, seed, 0.9, num_draws=100)
        covered += low <= truth <= high
    assert 82 < covered < 97


def likeliest(*flags):
    return [TokenScores(np.zeros(len(each)), np.array(each, dtype=bool)) for each in flags]


def test_a_row_is_repeated_up_to_the_first_other_token():
    members = likeliest(
        [0, 0, 1, 1, 1, 0], [0, 0, 1, 0, 1, 0], [1, 1, 0, 1, 1, 1], [1] * 4
    )  # the last one is too short
    first, second = repeated_rows((members, likeliest([0] * 5)), 3, **HOW)
    assert (first["num_rows"], first["num_whole"], first["share"]) == (3, 1, pytest.approx((3 + 1 + 0) / 9))
    assert (second["rows"], second["num_rows"], second["share"], second["num_whole"]) == ("non-members", 1, 0, 0)
    assert 0 <= first["share_low"] < first["share"] < first["share_high"] <= 1
    assert repeated_rows((members, likeliest([0] * 4)), 3, **HOW) == []
