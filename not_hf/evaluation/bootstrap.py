"""Bootstrap confidence intervals of a mean negative log-likelihood, of the difference of two, and of two samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from not_hf.errors import NotHFError

Floats = NDArray[np.float64]


class ConfidenceInterval(NamedTuple):
    """The ends of an interval."""

    low: float
    high: float


def check_level(level: float) -> None:
    """Check a level of confidence."""
    if not 0 < level < 1:
        raise NotHFError(f"confidence_level must be between 0 and 1, such as 0.95, got {level!r:.100}")


def nll_intervals(
    nats: Floats, weights: Floats, seed: int = 0, level: float = 0.95, num_draws: int = 1000
) -> tuple[Floats, Floats]:
    """Compute percentile bootstrap intervals of nats per token (Efron and Tibshirani 1993, chapter 13).

    As many windows as there are, are drawn with replacement; the summed nats of a draw are divided by its tokens. All
    models are given the same draws, so their intervals can be compared.

    Args:
        nats: Summed over each window, under each model, `(models, windows)`.
        weights: What nats are divided by, such as the scored tokens of each window: `(windows,)`, or
            `(models, windows)` if not the same for all models.
        seed: Of the draws.
        level: Of confidence.
        num_draws: Number of draws.

    Returns:
        Lower and upper ends in nats per token, `(models,)` each; NaN if there is only one window to draw.
    """
    return _percentiles(_drawn_means(nats, weights, seed, num_draws), level)


def nll_difference_intervals(
    nats: tuple[Floats, Floats],
    weights: tuple[Floats, Floats],
    seed: int = 0,
    level: float = 0.95,
    num_draws: int = 1000,
) -> tuple[Floats, Floats]:
    """Compute paired bootstrap intervals of differences in nats per token, second less first.

    Both models of a pair are given the same draws. So what makes a window hard for both does not widen the interval.

    Args:
        nats: Of the first and of the second model of each pair, as for `nll_intervals`, `(pairs, windows)` each.
        weights: Of the first and of the second, `(windows,)` or `(pairs, windows)` each.
        seed: Of the draws, like `level` and `num_draws` as for `nll_intervals`.

    Returns:
        Lower and upper ends, `(pairs,)` each; NaN if there is only one window to draw.
    """
    first, second = (_drawn_means(*each, seed, num_draws) for each in zip(nats, weights, strict=True))
    return _percentiles(second - first, level)


def two_sample_intervals(
    statistic: Callable[[Floats, Floats], Sequence[float]],
    first: Floats,
    second: Floats,
    seed: int = 0,
    level: float = 0.95,
    num_draws: int = 1000,
) -> tuple[Floats, Floats]:
    """Compute percentile bootstrap intervals of what tells two samples apart.

    Args:
        statistic: Numbers of two samples.
        first: The first sample, `(rows,)`, of which as many rows are drawn with replacement.
        second: The second one, drawn likewise, independently.
        seed: Of the draws, like `level` and `num_draws` as for `nll_intervals`.

    Returns:
        Lower and upper ends, `(numbers,)` each.
    """
    generator = np.random.default_rng(seed)
    drawn = [[generator.choice(each, len(each)) for each in (first, second)] for _ in range(num_draws)]
    return _percentiles(np.array([statistic(*pair) for pair in drawn]), level)


def _drawn_means(nats: Floats, weights: Floats, seed: int, num_draws: int) -> Floats:
    """Draw windows, and compute the mean of each draw under each model, `(num_draws, models)`."""
    num_windows = nats.shape[1]
    if num_windows < 2:
        return np.full((1, len(nats)), np.nan)
    generator = np.random.default_rng(seed)
    means = np.empty((num_draws, len(nats)))
    for draw in means:
        counts = np.bincount(generator.integers(num_windows, size=num_windows), minlength=num_windows)
        with np.errstate(divide="ignore", invalid="ignore"):  # infinite nats, or windows without bytes
            draw[:] = nats @ counts / (weights @ counts)
    return means


def _percentiles(means: Floats, level: float) -> tuple[Floats, Floats]:
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high
