"""Numbers of models that were scored on the same blocks, by method and scale."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from not_hf.evaluation.bootstrap import Floats, nll_difference_intervals, nll_intervals
from not_hf.evaluation.perplexity import perplexity_of

Key = tuple[str, float]  # method and scale
Nats = dict[Key, dict[str, Floats]]  # summed negative log-likelihood of each block of each part of the text

BASE: Key = ("base", 0.0)
PREFIXES = {"test": "", "control": "control_"}  # of the names of the numbers


def best_scale(nats: Nats, method: str) -> float:
    """Return the scale of a method with the least loss on the part to choose by."""
    losses = {scale: float(each["choose"].sum()) for (name, scale), each in nats.items() if name == method}
    return min(losses, key=lambda scale: math.inf if math.isnan(losses[scale]) else losses[scale])


def score_rows(nats: Nats, num_tokens: int, seed: int) -> list[dict[str, Any]]:
    """Compute perplexities, and their ratios to that of the base, with 95 % intervals.

    Args:
        nats: Of the base and of all methods.
        num_tokens: Scored tokens of a block.
        seed: Of the intervals.

    Returns:
        A row for each key, with what `MethodComparison` describes.
    """
    rows: list[dict[str, Any]] = [{"method": method, "scale": scale} for method, scale in nats]
    for part, prefix in PREFIXES.items():
        if part not in nats[BASE]:
            continue
        sums = np.stack([each[part] for each in nats.values()])  # (models, blocks)
        base = np.broadcast_to(nats[BASE][part], sums.shape)
        weights = np.full(sums.shape[1], float(num_tokens))
        means = sums.mean(axis=1) / num_tokens
        (low, high), ratio = nll_intervals(sums, weights, seed), means - base.mean(axis=1) / num_tokens
        ratio_low, ratio_high = nll_difference_intervals((base, sums), (weights, weights), seed)
        columns = {"perplexity": means, "low": low, "high": high}
        columns |= {"perplexity_ratio": ratio, "ratio_low": ratio_low, "ratio_high": ratio_high}
        for n, row in enumerate(rows):
            row |= {prefix + name: perplexity_of(float(values[n])) for name, values in columns.items()}
    return rows
