"""Filterbanks against a double-precision reading of Kaldi's rules, frame by frame."""

from __future__ import annotations

import math

import numpy as np
import pytest

from xllm_jax.data.media import mel_filters, speech

FLOOR = math.log(np.finfo(np.float32).eps)  # what Kaldi makes of no energy at all


def mel(hertz: float) -> float:
    return 1127 * math.log(1 + hertz / 700)


def moved(hertz: float, factor: float) -> float:
    """Kaldi's VTLN (feat/mel-computations.cc) with --vtln-low=100 and --vtln-high=-500."""
    low, high = 100 * max(1, factor), 7500 * min(1, factor)
    if hertz < low:
        return 20 + (low / factor - 20) / (low - 20) * (hertz - 20)
    if hertz < high:
        return hertz / factor
    return 8000 + (8000 - high / factor) / (8000 - high) * (hertz - 8000)


def kaldi(samples: np.ndarray, bins: int = 80, warp: float = 1.0) -> np.ndarray:
    """Kaldi's log-mel filterbanks without dither in float64, `[frames, bins]`."""
    samples = np.asarray(samples, np.float64)
    edges = np.linspace(mel(20), mel(8000), bins + 2)
    if warp != 1:
        edges = [mel(moved(700 * (math.exp(edge / 1127) - 1), warp)) for edge in edges]
    points = [mel(16000 / 512 * bin_) for bin_ in range(256)]
    rows = []
    for start in range(0, len(samples) - 399, 160):
        frame = samples[start : start + 400] - math.fsum(samples[start : start + 400]) / 400
        frame = frame - 0.97 * np.concatenate([frame[:1], frame[:-1]])
        power = np.abs(np.fft.rfft(frame * np.hanning(400) ** 0.85, 512)) ** 2
        energies = []
        for low, middle, high in zip(edges, edges[1:], edges[2:]):
            weights = np.interp(points, [low, middle, high], [0, 1, 0], left=0, right=0)
            energies.append(max(weights @ power[:256], np.finfo(np.float32).eps))
        rows.append(np.log(energies))
    return np.array(rows)


@pytest.mark.parametrize("noise", [1, 10, 1000])
@pytest.mark.parametrize("offset", [0, 300, -5000, 20000])
@pytest.mark.parametrize("whole", [True, False])
def test_a_constant_offset_costs_no_precision(offset, noise, whole):
    samples = offset + noise * np.random.default_rng(offset % 7).normal(size=8000)
    samples = (np.rint(samples) if whole else samples + 0.37).astype(np.float32)
    found = speech.filterbank(samples)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, kaldi(samples), atol=1e-3)


@pytest.mark.parametrize("level", [0, 1, 5000, -12345.678, 0.1, 32767])
def test_a_constant_stretch_has_no_energy(level):
    noise = np.random.default_rng(1).normal(size=4000) * 1000
    samples = np.concatenate([noise, np.full(4000, level), noise + 900]).astype(np.float32)
    found, wanted = speech.filterbank(samples), kaldi(samples)
    silent = [n for n in range(len(found)) if 160 * n >= 4000 and 160 * n + 400 <= 8000]
    assert len(silent) > 20
    np.testing.assert_allclose(found[silent], FLOOR, atol=1e-6)
    np.testing.assert_allclose(found, wanted, atol=1e-3)


def test_offsets_that_change_are_removed_frame_by_frame():
    rng = np.random.default_rng(2)
    parts = [level + 20 * rng.normal(size=3000) for level in (-9000, 4000, 15000, 0)]
    samples = np.concatenate(parts).astype(np.float32)
    np.testing.assert_allclose(speech.filterbank(samples), kaldi(samples), atol=3e-3)


@pytest.mark.parametrize("length", [400, 479, 480, 559, 560, 799, 800, 21000])
@pytest.mark.parametrize("bins", [23, 80])
def test_every_length_has_its_frames(length, bins):
    samples = np.random.default_rng(length).normal(size=length).astype(np.float32) * 100
    found, wanted = speech.filterbank(samples, bins), kaldi(samples, bins)
    assert found.shape == wanted.shape == (1 + (length - 400) // 160, bins)
    np.testing.assert_allclose(found, wanted, atol=1e-3)


@pytest.mark.parametrize("warp", [0.8, 0.9, 0.95, 1.05, 1.1, 1.25])
def test_another_vocal_tract_moves_the_filters_as_kaldi_does(warp):
    samples = np.random.default_rng(5).normal(size=4000).astype(np.float32) * 100
    found = speech.filterbank(samples, 40, warp)
    np.testing.assert_allclose(found, kaldi(samples, 40, warp), atol=1e-3)
    assert np.abs(found - speech.filterbank(samples, 40)).max() > 0.5


def test_a_longer_tract_is_heard_as_lower_formants():
    """A tone in the middle lies in the filter that a tone `factor` times as high lay in."""
    time = np.arange(8000) / 16000

    def loudest(hertz, warp=1.0):
        tone = (1000 * np.sin(2 * np.pi * hertz * time)).astype(np.float32)
        return speech.filterbank(tone, 80, warp).mean(0).argmax()

    for hertz in (900, 1500, 2600):
        assert abs(loudest(hertz, 1.1) - loudest(hertz * 1.1)) <= 1
        assert abs(loudest(hertz, 0.9) - loudest(hertz * 0.9)) <= 1


def test_factors_lie_within_the_largest_change_and_few_filters_are_computed():
    rng = np.random.default_rng(0)
    found = [mel_filters.drawn(0.1, rng) for _ in range(500)]
    assert min(found) == pytest.approx(0.9) and max(found) == pytest.approx(1.1)
    assert abs(np.mean(found) - 1) < 0.01 and len(set(found)) == 21
    assert mel_filters.drawn(0.1, None) == mel_filters.drawn(0.0, rng) == 1.0
