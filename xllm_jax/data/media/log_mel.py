"""Sounds as Whisper's encoder reads them (arXiv 2212.04356): log-mel spectrograms.

Samples from -1 to 1; Hann windows of 25 ms every 10 ms, the first around the first sample; power
spectrum, mel filters of equal area on Slaney's scale, decimal logarithm. What is more than 8
decades below the loudest value of the sound is cut off, and the rest lies roughly between -1 and 1.

Whisper's own code completes every sound to 30 seconds with zeros. Here it has the frames that any
sample reaches: the others are all alike, and `models/whisper.py` puts them behind.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import scipy.fft

from xllm_jax.core.stage import Data
from xllm_jax.data.media import specaugment, speech
from xllm_jax.data.media.modality import Modality
from xllm_jax.data.media.speech import HOP, RATE, WINDOW

FULL = 30 * RATE  # samples of Whisper's window
AT_ONCE = 128  # frames that are transformed together
LEAST = 1e-10  # power that counts as none
DECADES = 8.0  # below the loudest value
LINEAR, KNEE = (
    200 / 3,
    1000.0,
)  # hertz a mel below the knee of Slaney's scale, and the knee in hertz
GROWTH = np.log(6.4) / 27  # a mel above it


def load(
    path: str | Path,
    options: Mapping[str, Any] | None = None,
    rng: np.random.Generator | None = None,
) -> np.ndarray:
    """One file to the input of Whisper's encoder.

    Args:
      path: a sound, as of `speech.load`.
      options: 'bins' (80; large-v3 has 128), and 'specaugment' as of `speech.load`.
      rng: randomness of SpecAugment; None never augments.

    Returns:
      `[frames, bins]` float32.

    Raises:
      UserError: as `speech.read`.
    """
    options = options or {}
    features = log_mel(speech.read(path) / np.float32(32768), options.get("bins", 80))
    return specaugment.augmented(features, options, rng)


def frames_of(samples: int) -> int:
    """Frames that any of so many samples at 16 kHz reaches; those of 30 seconds end there."""
    reached = -(-(samples + WINDOW // 2) // HOP) if samples else 0
    return reached if samples > FULL else min(reached, FULL // HOP)


def log_mel(samples: np.ndarray, bins: int = 80) -> np.ndarray:
    """The features of one sound.

    Args:
      samples: `[samples]` at 16 kHz, from -1 to 1.
      bins: mel filters.

    Returns:
      `[frames, bins]` float32.
    """
    count, half = frames_of(len(samples)), WINDOW // 2
    # Mirrored before the beginning and behind 30 seconds; silence follows an earlier end.
    near = 0 <= FULL - len(samples) < half
    whole = np.pad(samples.astype(np.float64), (0, FULL - len(samples) if near else half))
    whole = np.pad(whole, (half, half), mode="reflect")
    cut = np.lib.stride_tricks.sliding_window_view(whole, WINDOW)[::HOP][:count]
    energy, filters = np.empty((count, bins)), mel_filters(bins)
    for start in range(0, count, AT_ONCE):
        part = slice(start, start + AT_ONCE)
        spectrum: Any = scipy.fft.rfft(cut[part] * hann_window(), axis=1)
        energy[part] = (np.square(spectrum.real) + np.square(spectrum.imag)) @ filters
    found = np.log10(np.maximum(energy, LEAST))
    found = np.maximum(found, found.max() - DECADES)
    return ((found + 4) / 4).astype(np.float32)


@functools.cache
def hann_window() -> np.ndarray:
    """The periodic Hann window, `[400]` float64."""
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)


@functools.cache
def mel_filters(bins: int) -> np.ndarray:
    """Triangles of equal area between 0 and 8,000 Hz, `[201, bins]` float64."""
    last = 15 + np.log(RATE / 2 / KNEE) / GROWTH
    mels = np.linspace(0, last, bins + 2)
    knee = KNEE / LINEAR
    corners = np.where(mels < knee, mels * LINEAR, KNEE * np.exp(GROWTH * (mels - knee)))
    points = np.linspace(0, RATE / 2, WINDOW // 2 + 1)[:, None]
    left, center, right = corners[:-2], corners[1:-1], corners[2:]
    rising, falling = (points - left) / (center - left), (right - points) / (right - center)
    return np.maximum(0, np.minimum(rising, falling)) * (2 / (right - left))


def count_frames(path: str | Path) -> int:
    """Frames of a file by its header alone.

    Raises:
      UserError: missing or broken file.
    """
    return frames_of(speech.count_samples(path))


def _load(path: str, data: Data, rng: np.random.Generator | None) -> np.ndarray:
    return load(path, data.speech, rng)[None]


MODALITY: Modality = dataclasses.replace(speech.MODALITY, load=_load, count=count_frames)
