"""What is said in a sound, and when: characters with the times at which CIF fired them.

The speech encoder reads a whole utterance, and CIF fires one embedding for each character and one
for its end. The ASR model of stage 1 writes a character for each; an LLM writes what it likes, and
where that is another number of characters, they are spread over the firings.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import uuid
import wave
from collections.abc import Callable, Sequence
from typing import Protocol, cast

import jax
import numpy as np

from xllm_jax.core.errors import UserError
from xllm_jax.core.types import Params
from xllm_jax.data.example import Example
from xllm_jax.data.media import modalities, speech
from xllm_jax.data.media.modalities import Load
from xllm_jax.data.record import Record
from xllm_jax.data.text.characters import END, CharacterVocabulary
from xllm_jax.data.text.instructions import instructions
from xllm_jax.inference import transcriber
from xllm_jax.inference.load_run import Restored
from xllm_jax.models import asr_search
from xllm_jax.models.asr import ASRDecoder
from xllm_jax.models.conformer import SpeechEncoder
from xllm_jax.models.whisper import WhisperEncoder
from xllm_jax.models.xllm import XLLM
from xllm_jax.serve.request import Answer, Request

FRAME = speech.HOP / speech.RATE  # seconds between two frames of the filterbank


@dataclasses.dataclass(frozen=True)
class Character:
    """A character and when it was said, in seconds from the beginning."""

    text: str
    start: float
    end: float


@dataclasses.dataclass(frozen=True)
class Heard:
    """What is said in a sound.

    Attributes:
      text: all of it.
      characters: its characters, in order.
      seconds: length of the sound.
    """

    text: str
    characters: tuple[Character, ...]
    seconds: float


class Ears(Protocol):
    """What hears; its methods may be called from any thread."""

    def warm_up(self) -> None:
        """Compiles all that will run."""
        ...

    def load(self, file: str) -> np.ndarray:
        """Filterbanks `[frames, bins]` float32 of a file.

        Raises:
          UserError: it cannot be read, or is too long.
        """
        ...

    def times(self, features: np.ndarray) -> tuple[list[float], list[str] | None]:
        """(seconds at which CIF fired, the end's included; a text for each, or None) of a file."""
        ...


Ask = Callable[[Request], Answer]


@dataclasses.dataclass(frozen=True)
class LLMEars:
    """Hears by the speech encoder and the LLM; the engine writes the text.

    Attributes:
      restored: networks and parameters of a run with speech.
      read: opens files.
    """

    restored: Restored
    read: Load

    @property
    def hop(self) -> float:
        """Seconds of a frame of the speech encoder."""
        return hop(self.restored.model, self.restored.model.parts("speech")[0])

    def warm_up(self) -> None:
        """Compiles for every length bucket."""
        warm_up(self, self.restored)

    def load(self, file: str) -> np.ndarray:
        """See `Ears`."""
        return load(self.restored, self.read, file)

    def times(self, features: np.ndarray) -> tuple[list[float], list[str] | None]:
        """See `Ears`; the texts are the LLM's to write."""
        values, lengths = padded(self.restored, features)
        encoder, interface = self.restored.model.parts("speech")
        model, params = self.restored.model, self.restored.params
        frames, counts = _fired(model, params, encoder, interface, values, lengths)
        return fired(np.asarray(frames)[0, : int(counts[0])], self.hop), None


@dataclasses.dataclass(frozen=True)
class ASREars:
    """Hears by the ASR model of stage 1.

    Attributes:
      restored: networks and parameters of a stage-1 speech run.
      read: opens files.

    Raises:
      UserError: the run is not one of stage 1.
    """

    restored: Restored
    read: Load

    def __post_init__(self) -> None:
        transcriber.require(self.restored.model.networks, self.restored.stage.name)

    @functools.cached_property
    def characters(self) -> CharacterVocabulary:
        """Of the ASR model."""
        return CharacterVocabulary.load(self.restored.stage.data.characters)

    @property
    def hop(self) -> float:
        """Seconds of a frame of the speech encoder."""
        return hop(self.restored.model, transcriber.ENCODER)

    def warm_up(self) -> None:
        """Compiles for every length bucket."""
        warm_up(self, self.restored)

    def load(self, file: str) -> np.ndarray:
        """See `Ears`."""
        return load(self.restored, self.read, file)

    def times(self, features: np.ndarray) -> tuple[list[float], list[str] | None]:
        """See `Ears`."""
        values, lengths = padded(self.restored, features)
        found = _recognized(self.restored.model, self.restored.params, values, lengths)
        tokens, frames, counts = map(np.asarray, found)
        count = int(counts[0])
        written = tokens[0, :count].tolist()
        count = written.index(END) + 1 if END in written else count
        texts = [self.characters.decode([token]) for token in written[:count]]
        return fired(frames[0, :count], self.hop), texts


def warm_up(ears: Ears, restored: Restored) -> None:
    """Compiles for every length bucket of a run."""
    data = restored.stage.data
    for frames in data.frames:
        ears.times(np.zeros((frames, data.speech.get("bins", 80)), np.float32))


def load(restored: Restored, read: Load, file: str) -> np.ndarray:
    """Filterbanks `[frames, bins]` of a file; errors as of `modalities.load`."""
    record = Record(Example(file))
    values, lengths = read("speech", file, restored.stage.data, record, 0, False)
    return values[0, : lengths[0]]


def padded(restored: Restored, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(`[1, frames, bins]` as long as the first bucket that holds it, lengths `[1]`)."""
    sizes = restored.stage.data.frames
    size = next((size for size in sizes if size >= len(features)), None)
    if size is None:
        what = f"has {len(features)} frames, more than {sizes[-1]}"
        raise UserError(what, field="file", hint="Cut it into utterances")
    values = np.zeros((1, size, features.shape[1]), np.float32)
    values[0, : len(features)] = features
    return values, np.asarray([len(features)], np.int32)


def hop(model: XLLM, encoder: str) -> float:
    """Seconds of a frame of a speech encoder."""
    return FRAME * cast(SpeechEncoder | WhisperEncoder, model.networks[encoder]).reduction


def fired(frames: np.ndarray, seconds: float) -> list[float]:
    """The end of each frame `[n]` that completed a token, in seconds."""
    return [(int(frame) + 1) * seconds for frame in frames]


@functools.partial(jax.jit, static_argnames=("model", "encoder", "interface"))
def _fired(
    model: XLLM,
    params: Params,
    encoder: str,
    interface: str,
    values: np.ndarray,
    lengths: np.ndarray,
) -> tuple[jax.Array, jax.Array]:
    features, lengths = model.apply(params, encoder, values, lengths)
    found = model.apply(params, interface, features, lengths, method="fire")
    return found.frames, found.counts


@functools.partial(jax.jit, static_argnames=("model",))
def _recognized(
    model: XLLM, params: Params, values: np.ndarray, lengths: np.ndarray
) -> tuple[jax.Array, jax.Array, jax.Array]:
    features, lengths = model.apply(params, transcriber.ENCODER, values, lengths)
    found = model.apply(params, transcriber.INTERFACE, features, lengths, method="fire")
    decoder = cast(ASRDecoder, model.networks[transcriber.DECODER])
    weights = params[transcriber.DECODER]
    written = asr_search.search(decoder, weights, found.embeddings, found.counts)
    return written.tokens[:, 0], found.frames, found.counts


def question(file: str) -> Request:
    """What the LLM is asked about a spoken file."""
    name = uuid.uuid4().hex
    example = Example(name, (("speech", file),), instructions("asr")[0], task="asr")
    return Request(name, example)


def heard(text: str, times: Sequence[float], texts: Sequence[str] | None, seconds: float) -> Heard:
    """Characters with their times.

    Args:
      text: all that is said; '' where `texts` say it.
      times: at which CIF fired, the end's included.
      texts: what each firing wrote, or None.
      seconds: length of the sound.
    """
    text = text if texts is None else "".join(texts)
    times = [min(time, seconds) for time in times]
    if texts is not None:
        begins = [0.0, *times]
        found = [Character(*one) for one in zip(texts, begins, times) if one[0]]
        return Heard(text, tuple(found), seconds)
    signs = [sign for sign in text if not sign.isspace()]
    # The last firing is the end's.
    ends = times[:-1] if len(times) > 1 else times or [seconds]
    edges = np.interp(
        np.arange(len(signs) + 1), np.linspace(0, len(signs), len(ends) + 1), [0, *ends]
    )
    spans = zip(signs, edges[:-1].tolist(), edges[1:].tolist())
    return Heard(text, tuple(Character(*one) for one in spans), seconds)


def wav(samples: bytes) -> bytes:
    """A WAV file of 16 kHz mono samples of 16 bits, little-endian."""
    content = io.BytesIO()
    with wave.open(content, "wb") as written:
        written.setnchannels(1)
        written.setsampwidth(2)
        written.setframerate(speech.RATE)
        written.writeframes(samples)
    return content.getvalue()


def by_default(restored: Restored, read: Load | None = None) -> LLMEars | None:
    """How a run hears by itself; None where it hears nothing, or what CIF has made already."""
    data = restored.stage.data
    names = [name for name, _, _ in restored.model.modalities]
    if modalities.SPEECH not in names or modalities.featured(data):
        return None
    return LLMEars(restored, read or modalities.load)
