"""Confidence intervals: how far a score could be off with other test samples.

Every score here is a function of sums over the test samples (a mean, an error rate, BLEU), so one
description serves all: what each sample adds to the sums, and the function.

    shares         Clopper-Pearson: 50 right of 50 is not certainty, [92.9 %, 100 %]
    paired differences of shares, and samples that are (nearly) equal
                   Dirichlet weights over the samples and one more at the end of the scale
                   (Gaffke's bound), which for shares is Clopper-Pearson
    other scores   the studentized bootstrap with a linearized standard error, widened a little for
                   few samples

With 10 samples or more, each holds the truth at least 93 times of 100 for shares, error rates,
CIDEr-like and skewed means and paired differences (`tests/test_intervals.py`). An interval is about
other samples; what another training run would give, it does not know.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

RESAMPLES, SHARE = 2000, 0.95
FEWEST = 10  # with fewer samples, their spread is not looked at

Value = Callable[[np.ndarray], np.ndarray]


class Estimate(NamedTuple):
    """A score with its interval and the number of samples it comes from.

    All but the number are NaN where there is nothing to score.
    """

    value: float
    low: float
    high: float
    samples: int


def rate(sums: np.ndarray) -> np.ndarray:
    """First sum over the second, `[..., 2]` to `[...]`; NaN where the second is 0."""
    return sums[..., 0] / np.where(sums[..., 1] == 0, np.nan, sums[..., 1])


def estimate(
    statistics: np.ndarray,
    value: Value,
    *,
    ends: np.ndarray | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
    share: float = SHARE,
) -> Estimate:
    """Score of all samples and its confidence interval.

    Args:
      statistics: `[N, K]` or `[N]`, what each sample adds to the sums.
      value: sums `[..., K]` to scores `[...]`; the sums of N samples, always.
      ends: `[2, K]`, what a sample at the low and at the high end of the scale adds; the lowest and
        highest of the samples where it is not known.
      seed: of the resampling.
      resamples: number of bootstrap samples.
      share: how often the interval shall hold the truth.

    Returns:
      NaN for value and interval where there are no samples, or all add 0 to what is divided by.
    """
    statistics = np.asarray(statistics, np.float64)
    statistics = statistics[:, None] if statistics.ndim == 1 else statistics
    count = len(statistics)
    found = float(value(statistics.sum(axis=0))) if count else math.nan
    if math.isnan(found):
        return Estimate(found, found, found, count)
    # Differences of shares are none, even where no sample got worse.
    positive = ends is None or np.asarray(ends)[0, 0] >= 0
    if value is rate and positive and _is_among(statistics, (0, 1)):
        return Estimate(found, *clopper_pearson(statistics[:, 0].sum(), count, share), count)
    generator = np.random.default_rng(seed)
    limits = None
    if value is not rate or not _is_among(statistics, (-1, 0, 1)):
        limits = studentized(statistics, value, generator, resamples, share)
    if limits is None:
        ends = _observed_ends(statistics, value) if ends is None else np.asarray(ends, np.float64)
        limits = bounded(statistics, value, ends, generator, resamples, share)
    return Estimate(found, min(limits[0], found), max(limits[1], found), count)


def _is_among(statistics: np.ndarray, values: tuple[int, ...]) -> bool:
    """Whether all samples count alike, each with one of the values, as shares do."""
    return bool((statistics[:, 1] == 1).all() and np.isin(statistics[:, 0], values).all())


def clopper_pearson(right: float, count: int, share: float = SHARE) -> tuple[float, float]:
    """The exact interval of a share: `right` of `count`."""
    from scipy.stats import beta  # half a second, which who only trains does not wait for

    miss = (1 - share) / 2
    low = beta.ppf(miss, right, count - right + 1) if right else 0.0
    high = beta.ppf(1 - miss, right + 1, count - right) if right < count else 1.0
    return float(low), float(high)


def studentized(
    statistics: np.ndarray,
    value: Value,
    generator: np.random.Generator,
    resamples: int,
    share: float,
) -> tuple[float, float] | None:
    """Interval from the distribution of (resampled score - score) / (its standard error).

    A resample without a score, as where all its denominators are 0, is left out.

    Args:
      statistics: `[N, K]`.
      value: see `estimate`.
      generator: of the resampling.
      resamples: number of bootstrap samples.
      share: how often the interval shall hold the truth.

    Returns:
      None where the samples do not show how they spread: they add alike, or so many resamples do
      that the quantiles lie among those.
    """
    count = len(statistics)
    if count < FEWEST:
        return None
    draws = generator.multinomial(count, np.full(count, 1 / count), resamples)
    draws = np.concatenate([np.ones((1, count), draws.dtype), draws])
    scores, errors = value(draws @ statistics), _standard_errors(draws, statistics, value)
    center, scale = scores[0], errors[0]
    if not scale > 1e-9 * max(1.0, abs(center)):
        return None
    distance = (scores - center)[1:][~np.isnan(scores[1:])]
    errors = errors[1:][~np.isnan(scores[1:])]
    flat = errors <= 1e-6 * scale
    turned = distance / np.where(flat, 1.0, errors)
    turned = np.where(flat & (np.abs(distance) > 1e-12), np.copysign(np.inf, distance), turned)
    # Few samples hold few extremes: wider by Student's t, and by quantiles farther out.
    miss = (1 - share) * (1 - 5 / count) / 2
    wider = _wider_by_few(count, share)
    low, high = np.quantile(turned, [miss, 1 - miss], method="closest_observation")
    if not np.isfinite([low, high]).all():
        return None
    return float(center - wider * high * scale), float(center - wider * low * scale)


def _wider_by_few(count: int, share: float) -> float:
    """Quantile of Student's t for `count` samples over that of the normal distribution."""
    from scipy.stats import norm, t  # see clopper_pearson

    return t.ppf((1 + share) / 2, count - 1) / norm.ppf((1 + share) / 2)


def _standard_errors(draws: np.ndarray, statistics: np.ndarray, value: Value) -> np.ndarray:
    """Linearized standard error of each resample's score, `[R]`.

    Args:
      draws: `[R, N]`, how often each sample occurs in a resample.
      statistics: `[N, K]`.
      value: see `estimate`.
    """
    count, size = statistics.shape
    sums = draws @ statistics
    products = (statistics[:, :, None] * statistics[:, None, :]).reshape(count, -1)
    spread = (draws @ products).reshape(-1, size, size)
    spread = (spread - sums[:, :, None] * sums[:, None, :] / count) * (count / max(count - 1, 1))
    slopes = []
    for place, step in enumerate(np.abs(statistics).mean(axis=0) / 2):
        beside = np.zeros(size)
        beside[place] = step or 1.0
        above, below = sums + beside, sums - beside
        below = np.where(sums >= 0, np.maximum(below, 0), below)  # counts stay counts
        slopes.append((value(above) - value(below)) / (above - below)[:, place])
    slope = np.stack(slopes, axis=-1)
    return np.sqrt(np.maximum(np.einsum("ri,rij,rj->r", slope, spread, slope), 0))


def bounded(
    statistics: np.ndarray,
    value: Value,
    ends: np.ndarray,
    generator: np.random.Generator,
    resamples: int,
    share: float,
) -> tuple[float, float]:
    """Interval from random weights of the samples and of one more at either end of the scale.

    Args:
      statistics: `[N, K]`.
      value: see `estimate`.
      ends: `[2, K]`, what the one more adds for the low and for the high limit.
      generator: of the weights.
      resamples: number of draws.
      share: how often the interval shall hold the truth.
    """
    count = len(statistics)
    weights = count * generator.dirichlet(np.ones(count + 1), resamples)
    low, high = (value(weights @ np.vstack([statistics, end])) for end in ends)
    miss = (1 - share) / 2
    return float(np.nanquantile(low, miss)), float(np.nanquantile(high, 1 - miss))


def _observed_ends(statistics: np.ndarray, value: Value) -> np.ndarray:
    alone = value(statistics * len(statistics))
    if np.isnan(alone).all():
        return statistics[:1].repeat(2, axis=0)
    return statistics[[np.nanargmin(alone), np.nanargmax(alone)]]


def mean(values: np.ndarray, **options: int) -> Estimate:
    """Mean of `[N]` values, on a scale that holds 0 and 1."""
    values = np.asarray(values, np.float64)
    return _mean(values, (values.min(initial=0), values.max(initial=1)), **options)


def _mean(values: np.ndarray, scale: tuple[float, float], **options: int) -> Estimate:
    pairs = np.stack([values, np.ones_like(values)], axis=1)
    return estimate(pairs, rate, ends=np.array([[end, 1.0] for end in scale]), **options)


def ratio(numerators: np.ndarray, denominators: np.ndarray, **options: int) -> Estimate:
    """Sum of `[N]` numerators over sum of `[N]` denominators, as in a corpus error rate.

    A resample whose denominators are all 0 has no rate and is left out of the interval.
    """
    pairs = np.stack([numerators, denominators], axis=1).astype(np.float64)
    return estimate(pairs, rate, ends=rate_ends(pairs), **options)


def rate_ends(pairs: np.ndarray) -> np.ndarray:
    """A sample of mean length without any error, and one that is all wrong: `[2, 2]`."""
    length = pairs[:, 1].mean() if len(pairs) else 1.0
    return np.array([[0.0, length], [length, length]])


def mean_difference(first: np.ndarray, second: np.ndarray, **options: int) -> Estimate:
    """Mean of second minus first, `[N]` each, of the same samples in the same order."""
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    values = np.concatenate([first, second])
    width = float(values.max(initial=1) - values.min(initial=0))
    return _mean(second - first, (-width, width), **options)
