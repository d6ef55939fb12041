"""The modalities that there are, by name, and how their files become media items.

A further one is a file like `image.py`, named in `Data.modalities`. With
`data.speech['features']` 'whisper' sounds become Whisper's spectrograms (`log_mel.py`); with
`data.speech_features='cif'` an utterance comes as what the speech encoder and CIF have made of it,
a `.npy` file (`cif_features.py`): readers call such a medium CIF, prompts and models 'speech'.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping

import numpy as np

from xllm_jax.core import lookup
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Data, Source
from xllm_jax.data.example import Example
from xllm_jax.data.media import (
    captions,
    cif_features,
    image,
    log_mel,
    speech,
    target_pictures,
    video,
)
from xllm_jax.data.media.modality import FRAMES, Modality
from xllm_jax.data.record import MEDIA, DoesNotFit, Record
from xllm_jax.data.text.characters import token_count

SPEECH = "speech"
KALDI, WHISPER = "kaldi", "whisper"  # filterbanks of sounds
CIF = "cif"  # a reader's name of features, and the step of the speech interface that makes them

MODALITIES: dict[str, Modality] = {
    "image": image.MODALITY,
    "video": video.MODALITY,
    SPEECH: speech.MODALITY,
}

# What opens a file for the batch: `load`, or `Decoders.load`, which does so within a deadline.
Load = Callable[[str, str, Data, Record, int, bool], tuple[np.ndarray, np.ndarray]]


def named(places: Mapping[str, str], field: str = "data.modalities") -> dict[str, Modality]:
    """{name: Modality} of the library's modalities and of further ones.

    Args:
      places: {name: 'package.module:NAME'} of the further ones, as in `Data.modalities`.
      field: where they were named, for messages.

    Raises:
      UserError: no such record.
    """
    return MODALITIES | {name: _record(name, place, field) for name, place in places.items()}


def stored(source: Source | None = None) -> dict[str, Modality]:
    """{name: Modality} of everything that a reader's examples may hold.

    Args:
      source: whose option 'modalities', if it has one, names further ones as in `named`.

    Raises:
      UserError: no such record.
    """
    places = source.options.get("modalities", {}) if source else {}
    return MODALITIES | {CIF: cif_features.MODALITY} | named(places, "modalities")


def _record(name: str, place: str, field: str) -> Modality:
    _, found = lookup.imported(place, f"{field}.{name}")
    if not isinstance(found, Modality):
        what = f"{place} is {type(found).__name__}, not a Modality"
        raise UserError(what, field=f"{field}.{name}", hint="See xllm_jax/data/media/modality.py")
    return found


def find(name: str, data: Data) -> Modality:
    """A modality as the data's settings have it: speech may come in several forms.

    Raises:
      UserError: unknown modality, or settings of speech that exclude each other.
    """
    if name in data.modalities:
        return _record(name, data.modalities[name], "data.modalities")
    if name == SPEECH and featured(data):
        return cif_features.MODALITY
    if name == SPEECH and filterbanks(data) == WHISPER:
        return log_mel.MODALITY
    if (found := captions.find(name, data)) is not None:
        return found
    if name in target_pictures.MODALITIES:
        return target_pictures.MODALITIES[name]
    if name not in MODALITIES:
        choices = ", ".join(MODALITIES | data.modalities)
        raise UserError(f"unknown modality {name!r}", hint=f"Choices: {choices}")
    return MODALITIES[name]


def task(names: Collection[str], known: Mapping[str, Modality]) -> str:
    """The task that files without words stand for: of what is said, else of the last modality.

    Args:
      names: modalities of the files, at least one.
      known: {name: Modality}, in the order in which one takes precedence over those before it.
    """
    said = [name for name in known if name in names and known[name].spoken]
    last = (said or [name for name in known if name in names])[-1]
    return known[last].tasks[bool(said) and not set(names) <= set(said)]


def featured(data: Data) -> bool:
    """Whether speech comes as CIF features instead of sounds.

    Raises:
      UserError: features of another kind, or augmented filterbanks of none.
    """
    kind = data.speech_features
    if kind not in ("", CIF):
        what = f"unknown features {kind!r}"
        raise UserError(what, field="data.speech_features", hint=f"Choices: '' and {CIF}")
    for name in speech.RANDOM:
        if kind and data.speech.get(name):
            what = "changes filterbanks, and speech comes as CIF features"
            raise UserError(what, field=f"data.speech.{name}", hint="Turn one of them off")
    return bool(kind)


def filterbanks(data: Data) -> str:
    """Whose filterbanks sounds become, KALDI or WHISPER.

    Raises:
      UserError: of neither, or VTLP of Whisper's, whose filters are fixed.
    """
    kind = data.speech.get("features", KALDI)
    if kind == WHISPER and data.speech.get("vtlp"):
        what = "moves Kaldi's filters, and data.speech.features is Whisper's"
        raise UserError(what, field="data.speech.vtlp", hint="Set it to 0")
    if kind not in (KALDI, WHISPER):
        what = f"unknown features {kind!r}"
        raise UserError(what, field="data.speech.features", hint=f"{KALDI} or {WHISPER}")
    return kind


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
    named = (((SPEECH if name == CIF else name), path) for name, path in example.media)
    return dataclasses.replace(example, media=tuple(named))


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
      (values `[items, *shape]` float32, lengths `[items]` int32: valid steps where files differ in
      length, else 1).

    Raises:
      UserError: the file cannot be read, or its decoder fails in any way of its own.
      DoesNotFit: more steps than the modality's bound.
    """
    found = find(modality, data)
    try:
        values = found.load(path, data, record.generator(MEDIA, part) if train else None)
    except UserError:
        raise
    except Exception as error:  # what foreign decoders raise on damaged files has no bounds
        what = f"its decoder failed ({type(error).__name__}: {error})"
        raise UserError(what, field=str(path), hint="Look at the file") from error
    if not found.bound:
        return values, np.ones(len(values), np.int32)
    count, most = values.shape[1], found.shape(data)[0]
    if count > most:
        what = f"has {count} frames, {found.bound} holds {most}"
        raise DoesNotFit(what, field=path, hint=f"Raise {found.bound}")
    padded = np.zeros((len(values), most, *values.shape[2:]), values.dtype)
    padded[:, :count] = values
    return padded, np.full(len(values), count, np.int32)


def check(modality: str, path: str, source: Source) -> None:
    """Decodes a file once, by the cheapest way, to see whether it can be.

    Args:
      modality: of the file, or CIF.
      path: the file.
      source: whose options may name further modalities.

    Raises:
      UserError: it cannot be read, or its decoder fails in any way of its own.
    """
    try:
        stored(source)[modality].read(path)
    except UserError:
        raise
    except Exception as error:  # as above
        what = f"its decoder failed ({type(error).__name__}: {error})"
        raise UserError(what, field=str(path)) from error


def bucketed(data: Data) -> bool:
    """Whether files of `data.items` differ in length and have the length buckets `data.frames`."""
    return any(find(name, data).bound == FRAMES for name in data.items)


def bucket(example: Example, data: Data, silent: int) -> int:
    """Length bucket of an example by the headers of its files, an index into `data.frames`.

    Args:
      example: to be read.
      data: with the buckets.
      silent: bucket of an example without speech or anything else that is bucketed.

    Returns:
      The first that holds every file; the last where a header tells nothing.
    """
    known, last = named(data.modalities), len(data.frames) - 1
    forms = {name: find(name, data) for name, _ in example.media if name in known}
    counted = [
        (count, path)
        for name, path in example.media
        if name in forms and forms[name].bound == FRAMES and (count := forms[name].count)
    ]
    try:
        frames = max((count(path) for count, path in counted), default=None)
    except Exception:  # opening it reports it, as for all bad files
        return last
    if frames is None:
        return silent
    return next((number for number, most in enumerate(data.frames) if frames <= most), last)


def slot_size(name: str, path: str, example: Example, data: Data) -> int:
    """Embeddings that a file takes in the prompt of an example of the data.

    Args:
      name: of its modality.
      path: the file.
      example: whose transcript may size it.
      data: the settings.

    Raises:
      UserError: sized by what it says, and nobody wrote that down.
    """
    found, most = find(name, data), data.embeddings[name]
    if found.slot == "transcript":
        return min(spoken_tokens(example), most)
    if found.slot == "steps":
        return min(max(_steps(found, path), 1), most)
    return most


def _steps(found: Modality, path: str) -> int:
    assert found.count is not None, "a slot of as many embeddings as steps"
    try:
        return found.count(path)
    except Exception:
        return 1  # opening it reports it, as for all bad files


def spoken_tokens(example: Example) -> int:
    """Embeddings that the spoken file of an example takes in the prompt: one a token.

    Raises:
      UserError: nobody wrote down what it says.
    """
    if not example.transcript:
        raise UserError("has speech without a transcript", field=example.key)
    return token_count(example.transcript)
