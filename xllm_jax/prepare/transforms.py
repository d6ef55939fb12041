"""Steps by which the paper built its data: what each does to one element, in any process.

`runner.mapped` applies them to all, here or on any runner of Beam.
"""

from __future__ import annotations

import hashlib
import io
import os
import weakref
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from xllm_jax.core import atomic, disk
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Data, Source
from xllm_jax.data import mixture
from xllm_jax.data.media import speech
from xllm_jax.data.media.decode_workers import Decoders
from xllm_jax.data.synthetic_world import speak
from xllm_jax.prepare.preparation import DEADLINE, MEMORY, rejected

Engine = Callable[[str], np.ndarray]  # text to `[samples]` float32 at 16 kHz within -1..1


def espeak(text: str) -> np.ndarray:
    """A text in one of espeak-ng's Mandarin voices, always the same for the same text."""
    rng = np.random.default_rng(zlib.crc32(text.encode()))
    return speak.speak(text, speak.sample_voice(rng))


class Decoding:
    """Decodes in a process of its own, with deadline and memory of preparing, where it works."""

    _decoders: Decoders | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_decoders": None}

    def decoders(self) -> Decoders:
        """The process, started when it is needed and ended with this step."""
        if self._decoders is None:
            limits = Data(deadline=DEADLINE, memory=MEMORY, threads=1)
            self._decoders = Decoders(limits)
            weakref.finalize(self, self._decoders.close)
        return self._decoders


class Usable(Decoding):
    """Looks whether a record can be read and its media decoded."""

    def __init__(self, name: str, source: Source):
        self._name, self._source, self._found = name, source, None

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_found": None}

    def __call__(self, place: int) -> tuple[int, dict[str, str] | None]:
        """The place, and {'key', 'file', 'reason'} if it cannot be used."""
        if self._found is None:
            self._found = mixture.read(self._name, self._source, "")
        try:
            example = self._found[place]
            for modality, path in example.media:
                self.decoders().check(modality, path, self._source)
        except UserError as error:
            return place, rejected(self._name, place, error)
        return place, None


class Speak:
    """Says one text to a file named after it; a file that is there is left alone."""

    def __init__(self, folder: str, engine: Engine):
        self._folder, self._engine = folder, engine

    def file(self, text: str) -> Path:
        """Where a text is said."""
        return Path(self._folder) / f"{hashlib.sha1(text.encode()).hexdigest()}.flac"

    def __call__(self, text: str) -> tuple[str, str]:
        """The text and its file."""
        file = self.file(text)
        if not file.is_file():
            _write(file, self._engine(text))
        return text, str(file)


class Resample(Decoding):
    """Converts one audio file of any rate and number of channels; one that is there is left."""

    def __init__(self, folder: str, root: str = ""):
        self._folder, self._root = folder, root

    def file(self, path: str) -> Path:
        """What is made of a file: WAV of a WAV, otherwise FLAC."""
        if not self._root:
            return Path(self._folder) / f"{hashlib.sha1(path.encode()).hexdigest()}.flac"
        made = Path(self._folder) / os.path.relpath(path, self._root)
        return made if made.suffix.lower() == ".wav" else made.with_suffix(".flac")

    def __call__(self, path: str) -> tuple[str, str, str]:
        """The path, the file made of it, and why there is none."""
        file = self.file(path)
        if not file.is_file():
            try:
                samples = np.clip(self.decoders().samples(path) / 32768, -1, 1)
            except UserError as error:
                return path, "", error.what
            _write(file, samples)
        return path, str(file), ""


def _write(file: Path, samples: np.ndarray) -> None:
    """Writes 16 kHz, 16-bit audio whole or not at all."""
    import soundfile

    disk.make_folder(file.parent)
    kind = "WAV" if file.suffix.lower() == ".wav" else "FLAC"
    with atomic.whole(file) as partial:
        made = io.BytesIO()  # libsndfile does not tell why a file cannot be written
        soundfile.write(made, samples, speech.RATE, format=kind, subtype="PCM_16")
        partial.write_bytes(made.getvalue())
