"""Steps by which the paper built its data, each a Beam transform: PCollection in, PCollection out.

What a step does to one element stands in a function or class without Beam. Beam is imported when a
transform is applied.
"""

from __future__ import annotations

import hashlib
import os
import weakref
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from xllm_jax.core import atomic
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Data, Source
from xllm_jax.data import mixture
from xllm_jax.data.media import speech
from xllm_jax.data.media.decode_workers import Decoders
from xllm_jax.data.rows.translated import same
from xllm_jax.data.synthetic_world import speak
from xllm_jax.prepare.preparation import DEADLINE, MEMORY, rejected

THRESHOLD = 0.45  # the paper's, of image and caption by CLIP
Engine = Callable[[str], np.ndarray]  # text to `[samples]` float32 at 16 kHz within -1..1


def deduplicated(texts: Any) -> Any:
    """One of the texts that differ in nothing but punctuation, case and spaces: the least."""
    import apache_beam as beam

    keyed = texts | "by sense" >> beam.Map(lambda text: (same(text), text))
    return keyed | "together" >> beam.GroupByKey() | "least" >> beam.Map(lambda kv: min(kv[1]))


def similar(pairs: Any, threshold: float = THRESHOLD) -> Any:
    """Of ({… 'similarity': number}) elements those that are similar enough.

    Args:
      pairs: dicts with the similarity of their image and caption, as CLIP or another model gave it.
      threshold: least similarity.
    """
    import apache_beam as beam

    return pairs | f"at least {threshold}" >> beam.Filter(
        lambda pair: float(pair["similarity"]) >= threshold
    )


def translated(texts: Any, table: Mapping[str, str]) -> Any:
    """(text, its translation) of every text that the table has; others are left out.

    Args:
      texts: of the source language.
      table: {text: translation}.
    """
    import apache_beam as beam

    known = texts | "known" >> beam.Filter(lambda text: bool(table.get(text, "").strip()))
    return known | "translate" >> beam.Map(lambda text: (text, table[text].strip()))


def usable(places: Any, name: str, source: Source) -> Any:
    """(place, what is wrong with it) of records of a source; None where nothing is.

    Args:
      places: numbers of records.
      name: of the source, for messages.
      source: to be opened once by every worker.
    """
    import apache_beam as beam

    return places | f"decode {name}" >> beam.Map(Usable(name, source))


def resampled(paths: Any, folder: str, root: str = "") -> Any:
    """(path, 16 kHz mono file in the folder, reason) of audio files; one of the last two is ''.

    Args:
      paths: of the files.
      folder: for the new ones.
      root: folder of the old ones, whose names and sub-folders the new ones keep; without one they
        are called by a hash of their path.
    """
    import apache_beam as beam

    return paths | "16 kHz" >> beam.Map(Resample(folder, root))


def spoken(texts: Any, folder: str, engine: Engine | None = None) -> Any:
    """(text, FLAC file in the folder) of every text.

    Args:
      texts: to be said.
      folder: for the files, made if needed.
      engine: of speech; espeak-ng in a voice that the text draws, where there is none.
    """
    import apache_beam as beam

    return texts | "speak" >> beam.Map(Speak(folder, engine or espeak))


def espeak(text: str) -> np.ndarray:
    """A text in one of espeak-ng's Mandarin voices, always the same for the same text."""
    rng = np.random.default_rng(zlib.crc32(text.encode()))
    return speak.speak(text, speak.sample_voice(rng))


class Usable:
    """Looks whether a record can be read and its media decoded."""

    def __init__(self, name: str, source: Source):
        self._name, self._source, self._found = name, source, None
        self._decoders: Decoders | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_found": None, "_decoders": None}

    def __call__(self, place: int) -> tuple[int, dict[str, str] | None]:
        """The place, and {'key', 'file', 'reason'} if it cannot be used."""
        if self._found is None:
            self._found = mixture.read(self._name, self._source, "")
        if self._decoders is None:
            limits = Data(deadline=DEADLINE, memory=MEMORY, threads=1)
            self._decoders = Decoders(limits)
            weakref.finalize(self, self._decoders.close)
        try:
            example = self._found[place]
            for modality, path in example.media:
                self._decoders.check(modality, path, self._source)
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


class Resample:
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
        try:
            if not file.is_file():
                _write(file, np.clip(speech.read(path) / 32768, -1, 1))
        except UserError as error:
            return path, "", error.what
        return path, str(file), ""


def _write(file: Path, samples: np.ndarray) -> None:
    """Writes 16 kHz, 16-bit audio whole or not at all."""
    import soundfile

    file.parent.mkdir(parents=True, exist_ok=True)
    kind = "WAV" if file.suffix.lower() == ".wav" else "FLAC"
    with atomic.whole(file) as partial:
        soundfile.write(partial, samples, speech.RATE, format=kind, subtype="PCM_16")
