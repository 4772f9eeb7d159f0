"""Bootstrap confidence intervals of a mean negative log-likelihood."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def nll_intervals(
    nats: Floats, num_tokens: Floats, seed: int = 0, level: float = 0.95, num_draws: int = 1000
) -> tuple[Floats, Floats]:
    """Compute percentile bootstrap intervals of nats per token (Efron and Tibshirani 1993, chapter 13).

    As many windows as there are, are drawn with replacement; the summed nats of a draw are divided by its tokens. All
    models are given the same draws, so their intervals can be compared.

    Args:
        nats: Summed over each window, under each model, `(models, windows)`.
        num_tokens: Scored tokens of each window, `(windows,)`.
        seed: Of the draws.
        level: Of confidence.
        num_draws: Number of draws.

    Returns:
        Lower and upper ends in nats per token, `(models,)` each; NaN if there is only one window to draw.
    """
    num_windows = len(num_tokens)
    if num_windows < 2:
        return np.full(len(nats), np.nan), np.full(len(nats), np.nan)
    generator = np.random.default_rng(seed)
    means = np.empty((num_draws, len(nats)))
    for draw in means:
        counts = np.bincount(generator.integers(num_windows, size=num_windows), minlength=num_windows)
        with np.errstate(invalid="ignore"):  # infinite nats
            draw[:] = nats @ counts / (num_tokens @ counts)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high
