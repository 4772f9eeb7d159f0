"""Attacks that guess which rows a model was trained on, and how much of a row it repeats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from not_hf.evaluation.bootstrap import Floats, nll_intervals, two_sample_intervals
from not_hf.evaluation.token_scores import TokenScores

_LEAST_LIKELY = 0.2  # share of the tokens of a row, for Min-K%
_NUMBERS = ("auc", "tpr")

Sides = tuple[Sequence[TokenScores], Sequence[TokenScores]]  # of members and of non-members


def attack_rows(model: Sides, reference: Sides | None, seed: int, level: float) -> list[dict[str, Any]]:
    """Measure how well each attack tells members from non-members.

    An attack gives each row a number, which is larger the more the row looks like a member:

    - `"loss"`: minus the mean negative log-likelihood of its tokens (Yeom et al. 2018, arXiv 1709.01604).
    - `"min-k"`: the mean log-likelihood of the fifth of its tokens that is least likely (Shi et al. 2024, arXiv
      2310.16789).
    - `"reference"`: how much less its loss is than under a reference model (Carlini et al. 2021, arXiv 2012.07805).
    - `"control"`: minus its loss under the reference model, which was not trained on members. What this tells apart
      differs for other reasons than training.

    Args:
        model: What the model says of the rows.
        reference: What the reference model says of them; `None`: the last two are left out.
        seed: Of the intervals.
        level: Of their confidence.

    Returns:
        A dict for each: `attack`; `auc`, the area under the ROC curve; `tpr`, the share of the members that it finds
        while it takes 1 % of the non-members for members; and the ends of their bootstrap intervals over rows.
    """
    means = [np.array([each.log_probs.mean() for each in side]) for side in model]
    least = [np.array([_least_likely(each.log_probs) for each in side]) for side in model]
    attacks = {"loss": means, "min-k": least}
    if reference is not None:
        usual = [np.array([each.log_probs.mean() for each in side]) for side in reference]
        attacks["reference"] = [own - other for own, other in zip(means, usual, strict=True)]
        attacks["control"] = usual
    return [{"attack": name, **_separation(own, others, seed, level)} for name, (own, others) in attacks.items()]


def repeated_rows(model: Sides, prefix_length: int, seed: int, level: float) -> list[dict[str, Any]]:
    """Measure how much of rows greedy decoding writes after their first tokens.

    As many tokens as the prefix has are asked for (Carlini et al. 2023, arXiv 2202.07646). Decoding repeats a row
    until a token of it is not the likeliest one after those before it, so one forward pass tells.

    Args:
        model: What the model says of the rows.
        prefix_length: Tokens of the prefix; shorter rows than twice that are left out.
        seed: Of the intervals.
        level: Of their confidence.

    Returns:
        A dict for members and one for non-members: `rows`, `num_rows`; `share`, that of the tokens asked for which are
        repeated before the first other one, with `share_low` and `share_high`; and `num_whole`, the rows of which all
        are. None if either has no row that is long enough.
    """
    found = []
    for name, side in zip(("members", "non-members"), model, strict=True):
        asked = [each.is_likeliest[prefix_length - 1 : 2 * prefix_length - 1] for each in side]
        right = np.array([float(each.cumprod().sum()) for each in asked if len(each) == prefix_length])
        if not len(right):
            return []
        low, high = nll_intervals(right[None], np.full(len(right), float(prefix_length)), seed, level)
        found.append(
            {
                "rows": name,
                "num_rows": len(right),
                "prefix_length": prefix_length,
                "share": float(right.mean()) / prefix_length,
                "share_low": low.item(),
                "share_high": high.item(),
                "num_whole": int((right == prefix_length).sum()),
            }
        )
    return found


def _separation(members: Floats, others: Floats, seed: int, level: float) -> dict[str, float]:
    numbers = auc_and_tpr(members, others)
    lows, highs = two_sample_intervals(auc_and_tpr, members, others, seed, level)
    return {
        key: float(value)
        for name, *values in zip(_NUMBERS, numbers, lows, highs, strict=True)
        for key, value in zip((name, f"{name}_low", f"{name}_high"), values, strict=True)
    }


def auc_and_tpr(members: Floats, others: Floats) -> tuple[float, float]:
    """Compute the area under the ROC curve, and the true positive rate at 1 % false positives.

    The area is the probability that a member has a larger number than a non-member, ties counting half.
    """
    ranked = np.sort(others)
    below = np.searchsorted(ranked, members, "left") + np.searchsorted(ranked, members, "right")  # twice as many
    threshold = ranked[-1 - len(ranked) // 100]
    return float(below.mean()) / 2 / len(ranked), float((members > threshold).mean())


def _least_likely(log_probs: Floats) -> float:
    count = max(1, round(_LEAST_LIKELY * len(log_probs)))
    return float(np.sort(log_probs)[:count].mean())
