"""Audio files to normalized log-mel filterbanks, as Kaldi computes them.

Samples are on the scale of 16-bit integers (not [-1, 1]); 25 ms frames every 10 ms, no frame that
reaches over the end; per frame: mean removed, pre-emphasis 0.97, Povey window, power spectrum of a
512-point FFT, 80 triangular mel filters from 20 Hz to 8 kHz, logarithm. Then per-utterance mean and
variance normalization. In training the vocal tract's length may be changed, and SpecAugment follow.
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import scipy.fft

from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Data
from xllm_jax.data.media import formats, mel_filters, paths, specaugment, unsized, wav
from xllm_jax.data.media.modality import FRAMES, Modality

RATE, FFT = mel_filters.RATE, mel_filters.FFT
WINDOW, HOP = 400, 160
BLOCK = math.gcd(WINDOW, HOP)  # frames begin and end where blocks of so many samples do
AT_ONCE = 128  # frames that are transformed together: what a core's own cache holds
PREEMPHASIS = np.float32(0.97)
RATES = (4_000, 384_000)  # samples a second that a recording may have
MOST_BYTES = 1 << 29  # of a WAV file
MOST_SAMPLES = 24_000_000  # over all channels; a small file of silence can unpack to anything
RANDOM = ("vtlp", "specaugment")  # options that draw something new each time
LEAST_FRAMES = 9  # fewer leave the speech encoder, which reduces 8 x, nothing to read


def load(
    path: str | Path,
    options: Mapping[str, Any] | None = None,
    rng: np.random.Generator | None = None,
) -> np.ndarray:
    """One file to the speech encoder's input.

    Args:
      path: any format that libsndfile reads (WAV, FLAC, OGG, MP3 ...), any rate, any channels.
      options: 'bins' (80), 'vtlp' (0), the largest change of the vocal tract's length, and
        'specaugment' (False): True, or arguments of `specaugment.spec_masks`.
      rng: randomness of both; None never augments.

    Returns:
      `[frames, bins]` float32.

    Raises:
      UserError: the file is missing, broken, cut off, empty, silent, not finite, too short or too
        long, or states a rate that no recording has.
    """
    options = options or {}
    features = filterbank(
        read(path), options.get("bins", 80), mel_filters.drawn(options.get("vtlp", 0.0), rng)
    )
    return specaugment.augmented(normalize(features), options, rng)


def read(path: str | Path) -> np.ndarray:
    """Reads a file as 16 kHz mono on the 16-bit scale: `[samples]` float32.

    Raises:
      UserError: see `load`.
    """
    samples, rate = _plain(path) or _decoded(path)
    if not samples.size:
        raise UserError("holds no samples", field=str(path), hint="Leave it out or record it again")
    samples = samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1)
    low, high = samples.min(), samples.max()
    if not np.isfinite(low + high):  # both carry a NaN on, and each an infinity of its side
        raise UserError("holds samples that are NaN or infinite", field=str(path))
    if low == high:
        raise UserError("is silent: every sample is the same", field=str(path))
    if rate != RATE:
        import soxr

        samples = soxr.resample(samples, rate, RATE)
    if frames_of(len(samples)) < LEAST_FRAMES:
        raise UserError(
            f"is too short: {len(samples) / RATE:.3f} s",
            field=str(path),
            hint=f"At least {(WINDOW + (LEAST_FRAMES - 1) * HOP) / RATE:.3f} s are needed",
        )
    return samples * np.float32(32768)


def _plain(path: str | Path) -> tuple[np.ndarray, int] | None:
    """Samples `[samples, channels]` and rate of an ordinary WAV file, None for all others."""
    source = paths.source(path)
    with open(source, "rb") if isinstance(source, str) else source as file:
        head = file.read(formats.HEAD)
    formats.check(path, "speech", head)
    waved = head[8:12] == b"WAVE"
    found = wav.samples(paths.read(path, most=MOST_BYTES)) if waved else None
    if found:
        _check_header(found[1], found[0].size, path)
    return found


def _decoded(path: str | Path) -> tuple[np.ndarray, int]:
    """The same by libsndfile, of everything that it reads.

    Raises:
      UserError: it cannot read the file, or the file is cut off.
    """
    import soundfile

    try:
        with soundfile.SoundFile(_sized(path)) as sound:
            _check_format(sound.format, path)
            _check_header(sound.samplerate, sound.frames * sound.channels, path)
            rate, form = sound.samplerate, sound.format
            # Told how many: some codecs, such as GSM's, cannot go back to count them.
            samples = sound.read(sound.frames, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, RuntimeError, ValueError) as error:
        raise _unreadable(error, path) from error
    if form.startswith("WAV"):
        _check_whole(path, len(samples))
    return (samples if form not in ("MP3", "MPEG") else _all_of_mp3(path, samples, rate)), rate


def _unreadable(error: Exception, path: str | Path) -> UserError:
    return UserError(f"not a readable audio file ({formats.reason(error)})", field=str(path))


def _all_of_mp3(path: str | Path, samples: np.ndarray, rate: int) -> np.ndarray:
    """Samples of an MP3, also where its header stated fewer and only those were read."""
    content = paths.read(path)
    held = unsized.in_packets(content, "mp3")
    if held - len(samples) <= unsized.MP3_PADDING:
        return samples
    _check_header(rate, held * samples.shape[1], path)
    try:
        return unsized.mp3(content)
    except ValueError as error:
        raise _unreadable(error, path) from error


def _sized(path: str | Path) -> str | io.BytesIO:
    """What libsndfile opens, with the true size in the header where that states none."""
    source = paths.source(path)
    with open(source, "rb") if isinstance(source, str) else source as file:
        content = unsized.mended(file)
    return io.BytesIO(content) if content else paths.source(path)


def _check_format(name: str, path: str | Path) -> None:
    """Raises UserError for a format of libsndfile that is not among the known ones."""
    if name not in formats.SOUNDS:
        raise UserError(f"not a readable audio file (of the format {name})", field=str(path))


def _check_header(rate: int, samples: int, path: str | Path) -> None:
    """Raises UserError for a rate that no recording has, or more samples than memory should."""
    low, high = RATES
    if not low <= rate <= high:
        what = f"says {rate} samples a second, not between {low} and {high}"
        raise UserError(what, field=str(path), hint="Record or convert it again")
    if samples > MOST_SAMPLES:
        what = f"holds {samples:,} samples, more than {MOST_SAMPLES:,}"
        raise UserError(what, field=str(path), hint="Cut it into utterances")


def _check_whole(path: str | Path, read: int) -> None:
    """Raises UserError for a WAV file that was cut off; libsndfile says nothing about it."""
    content = paths.read(path)
    for name, start, size in unsized.chunks(io.BytesIO(content)):
        missing = start + size - len(content)
        if name == b"data" and 0 < size < wav.STREAMED and missing > 0:
            what = f"is cut off after {read} samples: {missing} bytes are missing"
            raise UserError(what, field=str(path), hint="Download it again")
        if name == b"data":
            return


def count_frames(path: str | Path) -> int:
    """Filterbank frames of a file by its header alone.

    Raises:
      UserError: missing or broken file.
    """
    return frames_of(count_samples(path))


def count_samples(path: str | Path) -> int:
    """Samples that a file has at 16 kHz, by its header alone.

    Raises:
      UserError: missing or broken file.
    """
    import soundfile

    formats.check(path, "speech")
    try:
        info = soundfile.info(_sized(path))
    except (soundfile.SoundFileError, RuntimeError) as error:
        raise _unreadable(error, path) from error
    return -(-info.frames * RATE // max(info.samplerate, 1))


def frames_of(samples: int) -> int:
    """Frames of so many samples at 16 kHz."""
    return max(0, 1 + (samples - WINDOW) // HOP)


def filterbank(samples: np.ndarray, bins: int = 80, warp: float = 1.0) -> np.ndarray:
    """Log-mel filterbanks.

    Args:
      samples: `[samples]` at 16 kHz on the 16-bit scale.
      bins: number of mel filters.
      warp: factor of the vocal tract's length, see `mel_filters.warped`.

    Returns:
      `[frames, bins]` float32.
    """
    samples = np.ascontiguousarray(samples, np.float32)
    count = frames_of(len(samples))
    if not count:
        return np.zeros((0, bins), np.float32)
    # The mean is removed before the pre-emphasis, whose rounding would grow with it, and in two
    # parts: what is left of a sample behind the whole number has no rounding of its own.
    whole, rest = frame_means(samples, count)
    frames, energy = strided(samples, count), np.empty((count, bins), np.float32)
    centered = np.empty((AT_ONCE, WINDOW), np.float32)
    padded = np.zeros((AT_ONCE, FFT), np.float32)
    for start in range(0, count, AT_ONCE):
        part = slice(start, min(start + AT_ONCE, count))
        level, cut = centered[: part.stop - start], padded[: part.stop - start]
        np.subtract(frames[part], whole[part, None], out=level)
        level -= rest[part, None]
        np.multiply(level[:, :-1], -PREEMPHASIS, out=cut[:, 1:WINDOW])
        cut[:, 1:WINDOW] += level[:, 1:]
        np.multiply(level[:, 0], np.float32(1) - PREEMPHASIS, out=cut[:, 0])
        cut[:, :WINDOW] *= povey_window()
        # SciPy transforms several frames at once in vector registers, NumPy one after the other.
        spectrum: Any = scipy.fft.rfft(cut, axis=1)
        power = np.square(spectrum.real)
        power += np.square(spectrum.imag)
        for low, high, filters in mel_filters.banded(bins, warp):
            energy[part, low:high] = power[:, filters.start : filters.stop] @ filters.values
    return np.log(np.maximum(energy, np.finfo(np.float32).eps, out=energy), out=energy)


def frame_means(samples: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Means of frames as whole numbers and what is left of them, `[count]` float32 each.

    Summed in double precision, so that the mean of a constant is the constant itself.
    """
    blocks = samples[: len(samples) // BLOCK * BLOCK].reshape(-1, BLOCK)
    sums = blocks.sum(axis=1, dtype=np.float64)
    windows = np.lib.stride_tricks.sliding_window_view(sums, WINDOW // BLOCK)
    means = windows[:: HOP // BLOCK][:count].sum(axis=1) / WINDOW
    whole = np.rint(means)
    return whole.astype(np.float32), (means - whole).astype(np.float32)


def strided(samples: np.ndarray, count: int) -> np.ndarray:
    """Overlapping frames of the samples without a copy: `[count, 400]`."""
    return np.lib.stride_tricks.sliding_window_view(samples, WINDOW)[::HOP][:count]


@functools.cache
def povey_window() -> np.ndarray:
    """Kaldi's window, a Hann window to the power 0.85: `[400]` float32."""
    return (np.hanning(WINDOW) ** 0.85).astype(np.float32)


def normalize(
    features: np.ndarray, mean: np.ndarray | None = None, deviation: np.ndarray | None = None
) -> np.ndarray:
    """Mean and variance normalization of `[frames, bins]`.

    Args:
      features: filterbanks.
      mean, deviation: `[bins]` of a corpus (`corpus_statistics`); None takes the utterance's own.
    """
    if mean is None or deviation is None:
        mean, deviation = corpus_statistics([features], floor=1e-10)
    return ((features - mean) / deviation).astype(np.float32)


def corpus_statistics(
    features: Iterable[np.ndarray], floor: float = 1e-8
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation `[bins]` float32 over the frames of many utterances.

    Args:
      features: `[frames, bins]` each.
      floor: smallest variance.
    """
    count, total, squares = 0, 0.0, 0.0
    for one in features:
        one = one.astype(np.float64)
        count, total, squares = count + len(one), total + one.sum(0), squares + (one**2).sum(0)
    mean = np.asarray(total / count)
    variance = np.maximum(squares / count - mean**2, floor)
    return mean.astype(np.float32), np.sqrt(variance).astype(np.float32)


def _load(path: str, data: Data, rng: np.random.Generator | None) -> np.ndarray:
    return load(path, data.speech, rng)[None]


def _shape(data: Data) -> tuple[int, ...]:
    return data.frames[-1], data.speech.get("bins", 80)


def _random(data: Data) -> tuple[str, ...]:
    return tuple(f"data.speech.{name}" for name in RANDOM if data.speech.get(name))


MODALITY = Modality(
    load=_load,
    read=read,
    shape=_shape,
    fields=("speech", "frames"),
    libraries=("libsndfile", "soxr", "SciPy"),
    random=_random,
    bound=FRAMES,
    count=count_frames,
    slot="transcript",
    tasks=("asr", "spoken_vqa"),
    view="sound",
    padding="lower data.items.speech or data.frames, or give data.frames more length buckets",
)
