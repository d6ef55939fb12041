"""SpecAugment (arXiv 1904.08779): bands of filterbanks, over time and frequency, are masked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def augmented(
    features: np.ndarray, options: Mapping[str, Any], rng: np.random.Generator | None
) -> np.ndarray:
    """The features `[frames, bins]` behind SpecAugment, where the options ask for it.

    Args:
      features: filterbanks.
      options: 'specaugment' (False): True, or the arguments of `spec_masks`.
      rng: randomness of training; None never augments.
    """
    augment = options.get("specaugment", False)
    if rng is None or not augment:
        return features
    return mask(features, spec_masks(features.shape, rng, **({} if augment is True else augment)))


def spec_masks(
    shape: tuple[int, int],
    rng: np.random.Generator,
    frequency_masks: int = 2,
    frequency_width: int = 27,
    time_masks: int = 2,
    time_width: int = 50,
    time_share: float = 1.0,
) -> np.ndarray:
    """Random bands of SpecAugment (arXiv 1904.08779), without time warping.

    Args:
      shape: frames and bins.
      rng: anything with NumPy's `integers(low, high)`.
      frequency_masks, frequency_width: number of bands, and one more than the widest.
      time_masks, time_width: the same over time.
      time_share: a time band is at most this share of the utterance.

    Returns:
      bool of `shape`, True where the features are to be replaced.
    """
    frames, bins = shape
    masks = np.zeros(shape, bool)
    for _ in range(frequency_masks):
        width = int(rng.integers(0, min(frequency_width, bins)))
        start = int(rng.integers(0, bins - width))
        masks[:, start : start + width] = True
    most = min(time_width, int(frames * time_share))
    if most < 1:
        return masks
    for _ in range(time_masks):
        width = int(rng.integers(0, most))
        start = int(rng.integers(0, frames - width))
        masks[start : start + width] = True
    return masks


def mask(features: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Replaces masked values by the mean of all features."""
    return np.where(masks, features.mean(), features).astype(features.dtype)
