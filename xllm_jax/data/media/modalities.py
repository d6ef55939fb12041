"""Files of each modality as media items: how many, of which shape, and how they are read.

A new modality is one more entry of FORMS and one file beside `image.py`.

With `data.speech_features='cif'` an utterance comes as what the speech encoder and CIF have made of
it, a `.npy` file (`cif_features.py`): readers call such a medium CIF, prompts and models 'speech'.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Data
from xllm_jax.data.example import Example
from xllm_jax.data.media import cif_features, image, speech, video
from xllm_jax.data.record import MEDIA, DoesNotFit, Record
from xllm_jax.data.text.characters import token_count

CIF = "cif"  # a reader's name of features, and the step of the speech interface that makes them


@dataclasses.dataclass(frozen=True)
class Form:
    """What one file of a modality becomes.

    Attributes:
      items: media items per file.
      shape: of one item.
      fields: names of the fields of Data that its values depend on.
      random: options, by their full names, that change its values from one epoch to the next.
      spoken: the slot is as long as what is said.
    """

    items: int
    shape: tuple[int, ...]
    fields: tuple[str, ...]
    random: tuple[str, ...] = ()
    spoken: bool = False

    def bytes(self) -> int:
        """Bytes of one item."""
        return 4 * math.prod(self.shape)


def _image(data: Data) -> Form:
    size = data.image.get("size", 224)
    random = tuple(f"data.image.{name}" for name in ("scale", "flip") if data.image.get(name))
    return Form(1, (size, size, 3), ("image",), random)


def _video(data: Data) -> Form:
    options = data.image | data.video
    size = options.get("size", 224)
    return Form(options.get("frames", 5), (size, size, 3), ("image", "video"))


def _speech(data: Data) -> Form:
    if featured(data):
        shape = (data.embeddings["speech"], data.speech_width)
        return Form(1, shape, ("speech_features", "speech_width"), spoken=True)
    random = ("data.speech.specaugment",) if data.speech.get("specaugment") else ()
    shape = (data.frames[-1], data.speech.get("bins", 80))
    return Form(1, shape, ("speech", "frames"), random, spoken=True)


def _load_image(path: str, data: Data, rng: np.random.Generator, train: bool) -> np.ndarray:
    return image.load(path, data.image, rng if train else None)[None]


def _load_video(path: str, data: Data, rng: np.random.Generator, train: bool) -> np.ndarray:
    return video.load(path, data.image | data.video, rng if train else None)


def _load_speech(path: str, data: Data, rng: np.random.Generator, train: bool) -> np.ndarray:
    if featured(data):
        most, width = _speech(data).shape
        # Our own CIF drops tokens beyond its capacity, too.
        return cif_features.load(path, width)[None, :most]
    return speech.load(path, data.speech, rng if train else None)[None]


# What opens a file for the forms: `load`, or `Decoders.load`, which does so within a deadline.
Load = Callable[[str, str, Data, Record, int, bool], tuple[np.ndarray, np.ndarray]]

FORMS: dict[str, Callable[[Data], Form]] = {"image": _image, "video": _video, "speech": _speech}
LOADERS = {"image": _load_image, "video": _load_video, "speech": _load_speech}


def featured(data: Data) -> bool:
    """Whether speech comes as CIF features instead of sounds.

    Raises:
      UserError: features of another kind, or SpecAugment of none.
    """
    kind = data.speech_features
    if kind not in ("", CIF):
        what = f"unknown features {kind!r}"
        raise UserError(what, field="data.speech_features", hint=f"Choices: '' and {CIF}")
    if kind and data.speech.get("specaugment"):
        what = "masks filterbanks, and speech comes as CIF features"
        raise UserError(what, field="data.speech.specaugment", hint="Turn one of them off")
    return bool(kind)


def rename_cif_media(example: Example, data: Data) -> Example:
    """The example with its CIF features under the name 'speech', as prompts and models have it.

    Raises:
      UserError: it has CIF features, and `data.speech_features` does not say so.
    """
    paths = [path for modality, path in example.media if modality == CIF]
    if not paths:
        return example
    if not featured(data):
        hint = "Read them with --config.data.speech_features=cif, or the sounds themselves"
        raise UserError("holds cif features, not a sound", field=paths[0], hint=hint)
    named = ((("speech" if name == CIF else name), path) for name, path in example.media)
    return dataclasses.replace(example, media=tuple(named))


def form(modality: str, data: Data) -> Form:
    """What one file of a modality becomes under the data's options.

    Raises:
      UserError: unknown modality, or the data gives it no place in the prompt.
    """
    if modality not in FORMS:
        raise UserError(f"unknown modality {modality!r}", hint=f"Choices: {', '.join(FORMS)}")
    return FORMS[modality](data)


def load(
    modality: str, path: str, data: Data, record: Record, part: int, train: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Reads one file.

    Args:
      modality: of the file.
      path: the file.
      data: the options of its modality.
      record: whose randomness augments it.
      part: number of the file among the record's.
      train: augment.

    Returns:
      (values `[items, *shape]` float32, lengths `[items]` int32: valid frames or vectors of speech,
      else 1).

    Raises:
      UserError: the file cannot be read, or its decoder fails in any way of its own.
      DoesNotFit: speech of more frames than the largest bucket.
    """
    made = form(modality, data)
    try:
        values = LOADERS[modality](path, data, record.generator(MEDIA, part), train)
    except UserError:
        raise
    except Exception as error:  # what foreign decoders raise on damaged files has no bounds
        what = f"its decoder failed ({type(error).__name__}: {error})"
        raise UserError(what, field=str(path), hint="Look at the file") from error
    if not made.spoken:
        return values, np.ones(made.items, np.int32)
    count, most = values.shape[1], made.shape[0]
    if count > most:
        raise DoesNotFit(
            f"has {count} frames, data.frames holds {most}", field=path, hint="Raise data.frames"
        )
    padded = np.zeros((len(values), most, *values.shape[2:]), values.dtype)
    padded[:, :count] = values
    return padded, np.asarray([count], np.int32)


def bucket(example: Example, data: Data, silent: int) -> int:
    """Length bucket of an example by the headers of its speech files, an index into `data.frames`.

    Args:
      example: to be read.
      data: with the buckets.
      silent: bucket of an example without speech.

    Returns:
      The first that holds every file; the last where a header tells nothing.
    """
    paths = [path for modality, path in example.media if modality == "speech"]
    last = len(data.frames) - 1
    try:
        frames = max(map(speech.count_frames, paths), default=None)
    except UserError:
        return last
    if frames is None:
        return silent
    return next((number for number, most in enumerate(data.frames) if frames <= most), last)


def spoken_size(path: str, example: Example, data: Data) -> int:
    """Embeddings of a spoken file: one a vector of features, or one a token of the transcript.

    Raises:
      UserError: a sound, and nobody wrote down what it says.
    """
    if not featured(data):
        return spoken_tokens(example)
    try:
        return max(cif_features.count(path), 1)
    except UserError:
        return 1  # opening it will tell, where all bad files are told


def spoken_tokens(example: Example) -> int:
    """Embeddings that the spoken file of an example takes in the prompt: one a token.

    Raises:
      UserError: nobody wrote down what it says.
    """
    if not example.transcript:
        raise UserError("has speech without a transcript", field=example.key)
    return token_count(example.transcript)
