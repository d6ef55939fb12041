"""Kaldi's mel filters, and vocal tract length perturbation (Jaitly and Hinton, 2013).

VTLP moves the filters as another length of the vocal tract would move a voice's formants: networks
that hear the same sentence from many lengths hear voices that they have never met. The number of
frames stays as it is.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import numpy as np

RATE, FFT = 16_000, 512
LOW, HIGH = 20.0, RATE / 2  # of the filters, in hertz
WARPED_FROM, WARPED_TO = 100.0, HIGH - 500  # in hertz; Kaldi's --vtln-low and --vtln-high
STEPS = 10  # of a change on either side, so that filters are computed once


def mel(hertz: np.ndarray | float) -> np.ndarray:
    """Kaldi's mel scale."""
    return 1127.0 * np.log(1.0 + np.asarray(hertz, np.float64) / 700.0)


def warped(hertz: np.ndarray, factor: float) -> np.ndarray:
    """Frequencies for a voice whose vocal tract is longer by a factor, as Kaldi's VTLN has them.

    Divided by the factor in the middle; below and above, straight lines keep LOW and HIGH in place.

    Args:
      hertz: between LOW and HIGH.
      factor: about 0.8 to 1.25.
    """
    low, high = WARPED_FROM * max(1.0, factor), WARPED_TO * min(1.0, factor)
    return np.interp(hertz, (LOW, low, high, HIGH), (LOW, low / factor, high / factor, HIGH))


@functools.cache
def triangles(bins: int, warp: float = 1.0) -> np.ndarray:
    """Triangles on the mel scale: `[256, bins]` float32, the Nyquist bin left out.

    Args:
      bins: number of filters.
      warp: factor of `warped`.
    """
    edges = np.linspace(mel(LOW), mel(HIGH), bins + 2)
    if warp != 1.0:
        edges = mel(warped(700.0 * np.expm1(edges / 1127.0), warp))
    left, center, right = edges[:-2], edges[1:-1], edges[2:]
    points = mel(np.arange(FFT // 2) * (RATE / FFT))[:, None]
    rising, falling = (points - left) / (center - left), (right - points) / (right - center)
    return np.clip(np.minimum(rising, falling), 0.0, None).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Band:
    """Neighboring filters over the bins of the spectrum that any of them reads."""

    start: int
    stop: int
    values: np.ndarray


@functools.cache
def banded(bins: int, warp: float = 1.0) -> tuple[tuple[int, int, Band], ...]:
    """(first filter, end, Band) of three parts of `triangles`, which hold fewer zeros."""
    whole, found = triangles(bins, warp), []
    edges = (0, bins // 2, 3 * bins // 4, bins)
    for low, high in itertools.pairwise(edges):
        part = whole[:, low:high]
        used = np.flatnonzero(part.any(axis=1))
        start, stop = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 0)
        found.append((low, high, Band(start, stop, np.ascontiguousarray(part[start:stop]))))
    return tuple(found)


def drawn(most: float, rng: np.random.Generator | None) -> float:
    """A factor for one utterance: 1 and, on either side, STEPS up to the largest change.

    Args:
      most: the largest change; 0.1 draws from 0.9 to 1.1.
      rng: of training; None changes nothing.
    """
    if rng is None or not most:
        return 1.0
    return 1.0 + most * int(rng.integers(-STEPS, STEPS + 1)) / STEPS
