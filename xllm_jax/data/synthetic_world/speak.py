"""Sentences to speech: espeak-ng's Mandarin voices with gains and noises, 16 kHz FLAC."""

from __future__ import annotations

import _ctypes
import ctypes
import dataclasses
import io
import pathlib
from typing import Any

import numpy as np
import scipy.fft
import soundfile
import soxr

from xllm_jax.data.synthetic_world.scene import choose

RATE = 16000
VARIANTS = ("m1", "m2", "m3", "m4", "m5", "m6", "m7", "f1", "f3", "f4")
UNSEEN_VARIANT = "f2"
PITCHES = (25, 70)  # espeak's 0..100 scale
UNSEEN_PITCHES = (80, 95)
WORDS_PER_MINUTE = (200, 280)
NOISES = ("none", "none", "white", "pink", "babble")

# Constants of espeak-ng's speak_lib.h.
_SYNCHRONOUS_OUTPUT = 2
_DO_NOT_EXIT = 0x8000
_RATE_PARAMETER, _PITCH_PARAMETER = 1, 3
_UTF8, _END_PAUSE_OFF = 1, 0
_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)


@dataclasses.dataclass(frozen=True)
class Voice:
    """How a sentence is said and recorded; `snr` is the signal-to-noise ratio in dB."""

    variant: str
    pitch: int
    rate: int
    gain: float
    noise: str
    snr: float
    seed: int

    @property
    def unseen(self) -> bool:
        """Whether this is the voice that training never has."""
        return self.variant == UNSEEN_VARIANT

    @property
    def speaker(self) -> str:
        """AISHELL-like speaker name: one per voice variant, S0900 for the unseen one."""
        if self.unseen:
            return "S0900"
        return f"S{VARIANTS.index(self.variant) + 1:04d}"


def sample_voice(rng: np.random.Generator, unseen: bool = False) -> Voice:
    """Draws a voice; `unseen` takes the variant and the pitch band that training never has."""
    low, high = UNSEEN_PITCHES if unseen else PITCHES
    return Voice(
        variant=UNSEEN_VARIANT if unseen else choose(rng, VARIANTS),
        pitch=int(rng.integers(low, high + 1)),
        rate=int(rng.integers(WORDS_PER_MINUTE[0], WORDS_PER_MINUTE[1] + 1)),
        gain=float(rng.uniform(0.15, 0.8)),
        noise=choose(rng, NOISES),
        snr=float(rng.uniform(10, 30)),
        seed=int(rng.integers(2**31)),
    )


class Espeak:
    """The espeak-ng C library, loaded for the length of a `with` block.

    It is one global engine and not thread-safe: one thread per process. Its pitch flutter runs on
    in static variables from sentence to sentence, and no call resets it. Loading the library
    afresh (half a millisecond) does, so a sentence sounds the same whatever was said before.

    Raises:
      OSError: the library or its data did not load.
    """

    def __init__(self) -> None:
        import espeakng_loader

        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        data = str(pathlib.Path(espeakng_loader.get_data_path()).parent)
        self.rate = self._library.espeak_Initialize(
            _SYNCHRONOUS_OUTPUT, 0, data.encode(), _DO_NOT_EXIT
        )
        if self.rate <= 0:
            raise OSError(f"espeak-ng did not start with the data in {data}")
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(1))
        self._chunks: list[np.ndarray] = []
        # The C side keeps the pointer only: the attribute keeps the callback alive.
        self._callback = _CALLBACK(self._collect)
        self._library.espeak_SetSynthCallback(self._callback)

    def __enter__(self) -> Espeak:
        return self

    def __exit__(self, *_) -> None:
        self._library.espeak_Terminate()
        _ctypes.dlclose(self._library._handle)

    def _collect(self, samples, count, _events) -> int:
        if samples and count > 0:
            self._chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def say(self, text: str, variant: str, pitch: int, rate: int) -> np.ndarray:
        """The spoken text as float32 in -1..1 at `self.rate`."""
        self._chunks.clear()
        if self._library.espeak_SetVoiceByName(f"cmn+{variant}".encode()) != 0:
            raise OSError(f"espeak-ng has no voice cmn+{variant}")
        self._library.espeak_SetParameter(_RATE_PARAMETER, rate, 0)
        self._library.espeak_SetParameter(_PITCH_PARAMETER, pitch, 0)
        data = text.encode()
        size = ctypes.c_size_t(len(data) + 1)
        self._library.espeak_Synth(data, size, 0, 1, 0, _UTF8 | _END_PAUSE_OFF, None, None)
        self._library.espeak_Synchronize()
        return np.concatenate(self._chunks).astype(np.float32) / 32768


def speak(text: str, voice: Voice) -> np.ndarray:
    """A sentence in a voice: `[samples]` float32 at 16 kHz, the same for the same arguments."""
    with Espeak() as speaker:
        spoken = speaker.say(text, voice.variant, voice.pitch, voice.rate)
        samples = trim(soxr.resample(spoken, speaker.rate, RATE).astype(np.float32))
    samples *= voice.gain / np.abs(samples).max()
    rng = np.random.default_rng(voice.seed)
    edges = [np.zeros(int(RATE * rng.uniform(0.05, 0.2)), np.float32) for _ in range(2)]
    samples = np.concatenate([edges[0], samples, edges[1]])
    if voice.noise != "none":
        background = noise(voice.noise, len(samples), rng)
        power = np.sqrt(np.mean(samples**2) / np.mean(background**2))
        samples = samples + background * power * 10 ** (-voice.snr / 20)
    return np.clip(samples, -1, 1).astype(np.float32)


def trim(samples: np.ndarray, floor: float = 0.01) -> np.ndarray:
    """Cuts both ends where the sound stays below `floor` of its peak."""
    loud = np.flatnonzero(np.abs(samples) > floor * np.abs(samples).max())
    return samples[loud[0] : loud[-1] + 1]


def noise(kind: str, count: int, rng: np.random.Generator) -> np.ndarray:
    """White, pink or babble-like noise, `[count]` float32 of no particular level."""
    fft: Any = scipy.fft  # whose types are those of a dispatcher
    length = fft.next_fast_len(count, real=True)  # prime lengths cost a hundred times more
    white = rng.standard_normal(length, np.float32)
    if kind == "white":
        return white[:count].astype(np.float32)
    frequency = np.fft.rfftfreq(length, 1 / RATE)
    if kind == "pink":
        shaped = fft.rfft(white) / np.sqrt(np.maximum(frequency, 20))
        return fft.irfft(shaped, length)[:count].astype(np.float32)
    # Babble: a few talkers, each a band of noise that swells at the pace of syllables.
    time, total = np.arange(length) / RATE, np.zeros(length)
    for _ in range(4):
        center, pace = rng.uniform(250, 1800), rng.uniform(3, 6)
        # White noise is white in its spectrum too: no need to transform it first.
        spectrum = rng.standard_normal((len(frequency), 2), np.float32).view(np.complex64)[:, 0]
        spectrum *= np.exp(-(((frequency - center) / (0.5 * center)) ** 2))
        swell = 0.55 + 0.45 * np.sin(2 * np.pi * (pace * time + rng.random()))
        total += swell * fft.irfft(spectrum, length)
    return total[:count].astype(np.float32)


def write_flac(path: str | pathlib.Path, samples: np.ndarray) -> None:
    """Writes `[samples]` float32 as 16-bit FLAC at 16 kHz."""
    made = io.BytesIO()  # libsndfile does not tell why a file cannot be written
    soundfile.write(made, samples, RATE, format="FLAC", subtype="PCM_16")
    pathlib.Path(path).write_bytes(made.getvalue())
