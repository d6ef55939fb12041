"""Confidence intervals by resampling: how far a score could be off with other test samples.

Every score here is a function of sums over the test samples (a mean, an error rate, BLEU), so one
primitive serves all: draw samples with replacement, add their statistics up, apply the function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

RESAMPLES, SHARE = 2000, 0.95

Value = Callable[[np.ndarray], np.ndarray]


class Estimate(NamedTuple):
    """A score with its percentile interval and the number of samples it comes from."""

    value: float
    low: float
    high: float
    samples: int


def estimate(
    statistics: np.ndarray,
    value: Value,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    share: float = SHARE,
) -> Estimate:
    """Score of all samples and its bootstrap percentile interval.

    Args:
      statistics: `[N, K]` or `[N]`, what each sample adds to the sums.
      value: sums `[..., K]` to scores `[...]`; the sums of N samples, always.
      seed: of the resampling.
      resamples: number of bootstrap samples.
      share: of the bootstrap scores that the interval holds.

    Raises:
      ValueError: no samples.
    """
    statistics = np.asarray(statistics, np.float64)
    statistics = statistics[:, None] if statistics.ndim == 1 else statistics
    count = len(statistics)
    if not count:
        raise ValueError("no samples to estimate from")
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), resamples)
    scores = value(draws @ statistics)
    low, high = np.nanquantile(scores, [(1 - share) / 2, (1 + share) / 2])
    return Estimate(float(value(statistics.sum(axis=0))), float(low), float(high), count)


def mean(values: np.ndarray, **options: int) -> Estimate:
    """Mean of `[N]` values."""
    count = len(values)
    return estimate(values, lambda sums: sums[..., 0] / count, **options)


def ratio(numerators: np.ndarray, denominators: np.ndarray, **options: int) -> Estimate:
    """Sum of `[N]` numerators over sum of `[N]` denominators, as in a corpus error rate.

    A resample whose denominators are all 0 has no rate and is left out of the interval.
    """
    pairs = np.stack([numerators, denominators], axis=1)
    return estimate(pairs, _divide, **options)


def mean_difference(first: np.ndarray, second: np.ndarray, **options: int) -> Estimate:
    """Mean of second minus first, `[N]` each, of the same samples in the same order."""
    return mean(np.asarray(second, np.float64) - np.asarray(first, np.float64), **options)


def _divide(sums: np.ndarray) -> np.ndarray:
    below = np.where(sums[..., 1] == 0, np.nan, sums[..., 1])
    return sums[..., 0] / below
