"""Rows with named columns, as data set libraries give them, become Examples.

Media stay encoded: what a row carries as bytes is carried on, what it names is left a path.
"""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from xllm_jax.core import words
from xllm_jax.core.errors import UserError
from xllm_jax.data.example import Example
from xllm_jax.data.media import modalities
from xllm_jax.data.media.modality import Modality
from xllm_jax.data.media.paths import Carried

PLACES = "modalities"  # option of the readers that yield further modalities


@dataclasses.dataclass(frozen=True)
class Columns:
    """Which column is what; '' is none, and 'captions.text' looks into a column.

    Attributes:
      media: {modality: its column} of media, or of lists of them; '' is none here, too.
      answer: the text to be learnt; of a list the first, and all are references.
      question: the instruction.
      transcript: what the speech says; the answer, where speech has no question.
      task: of the examples; '' for what the columns suggest.
      places: where the records of further modalities are, see `modalities.named`.
    """

    media: Mapping[str, str]
    answer: str = ""
    question: str = ""
    transcript: str = ""
    task: str = ""
    places: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def present(self) -> dict[str, str]:
        """{modality: column} of the media that there are, in the order of the modalities.

        Raises:
          UserError: a column of an unknown modality.
        """
        return {n: self.media[n] for n in self.modalities() if self.media.get(n)}

    def modalities(self) -> dict[str, Modality]:
        """{name: Modality} of all that there may be.

        Raises:
          UserError: a column of another one.
        """
        known = modalities.named(self.places, PLACES)
        for name in self.media.keys() - known.keys():
            hint = f"Name its record by the option {PLACES!r}"
            raise UserError(f"unknown modality {name!r}", field="media", hint=hint)
        return known

    def check(self, known: Mapping[str, Any] | list[str], where: str) -> None:
        """Looks whether the columns are there.

        Raises:
          UserError: one is not; tells which are.
        """
        for name in (*self.present().values(), self.answer, self.question, self.transcript):
            if name.partition(".")[0] not in ("", *known):
                found = ", ".join(sorted(map(str, known)))
                raise UserError(f"no column {name!r}", field=where, hint=f"Columns: {found}")


def example(row: Mapping[str, Any], columns: Columns, key: str, where: str, rate: int) -> Example:
    """One row.

    Args:
      row: {column: value}; media as bytes, {'bytes', 'path'}, a path, or samples of sound.
      columns: what they are.
      key: of the example.
      where: place for messages; media are called after it.
      rate: samples a second of sound that is no file.

    Raises:
      UserError: a medium or a text that is missing or of another kind.
    """
    present, known = columns.present(), columns.modalities()
    media = tuple(
        (modality, _medium(one, f"{where}.{column}", rate))
        for modality, column in present.items()
        for one in _several(_value(row, column, where))
    )
    said = tuple(_text(one, where, columns.answer) for one in _texts(row, columns.answer, where))
    asked = _texts(row, columns.question, where)[:1]
    question = "".join(_text(one, where, columns.question) for one in asked)
    heard = "".join(_text(one, where) for one in _texts(row, columns.transcript, where)[:1])
    if columns.answer and not said:
        raise UserError("has no text", field=f"{where}.{columns.answer}")
    suggested = known[[*present][-1]].tasks[bool(question)] if present else "text"
    task = columns.task or suggested
    alone = [known[name].tasks[0] for name in present if known[name].slot == "transcript"]
    if task in alone and not columns.transcript:
        heard = said[0] if said else ""
    answer = said[0] if said else ""
    return Example(key, media, question, answer, task, references=said, transcript=heard)


def _value(row: Mapping[str, Any], column: str, where: str) -> Any:
    value: Any = row
    for name in column.split("."):
        if not isinstance(value, Mapping) or name not in value:
            raise UserError("missing value", field=f"{where}.{column}")
        value = value[name]
    return value


def _several(value: Any) -> list:
    numbers = isinstance(value, np.ndarray) and value.dtype.kind in "iuf"
    many = isinstance(value, (list, tuple, np.ndarray)) and not numbers
    return list(value) if many else [value]


def _texts(row: Mapping[str, Any], column: str, where: str) -> list:
    return _several(_value(row, column, where)) if column else []


def _text(value: object, where: str, column: str = "") -> str:
    try:
        found = value.decode("utf-8") if isinstance(value, bytes) else value
    except UnicodeDecodeError as error:
        raise UserError(f"is not UTF-8 text ({error.reason})", field=where) from None
    if not isinstance(found, str):
        raise UserError(f"is {words.kind(found)}, not a text", field=f"{where}.{column}")
    if column and not found.strip():
        raise UserError("is empty", field=f"{where}.{column}")
    return found.strip()


def _medium(value: object, where: str, rate: int) -> str:
    if isinstance(value, Mapping):
        content, path = value.get("bytes"), value.get("path")
        value = content if content is not None else path
    if isinstance(value, bytes) and value:
        return Carried(where, value)
    if isinstance(value, (str, os.PathLike)) and str(value):
        return str(value)
    if isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.kind in "if" and rate:
        return Carried(where, _wave(value, rate))
    raise UserError("is neither bytes nor a path", field=where)


def _wave(samples: np.ndarray, rate: int) -> bytes:
    """Samples, whole numbers on the 16-bit scale or others within one, as the bytes of a WAV."""
    import soundfile

    if samples.dtype.kind == "i":
        samples = np.clip(samples, -32768, 32767).astype(np.int16)
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format="WAV")
    return buffer.getvalue()
