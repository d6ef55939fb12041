"""The one place where whatever a reader raises becomes a UserError: it costs its record, and names
it, whatever the files of strangers hold."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from xllm_jax.core import sampling, words
from xllm_jax.core.errors import UserError
from xllm_jax.data.example import Example

SHOWN = 200  # letters of a foreign message
LOOKED_AT = 1000  # records, spread over a source, of which one must be readable
FIELDS = dict.fromkeys(("key", "instruction", "answer", "task", "transcript"), "a text") | {
    "references": "texts",
    "tags": "texts",
    "media": "pairs",
    "history": "pairs",
}


class Guarded(Sequence):
    """The examples of a reader; reading one raises nothing but UserError.

    Args:
      examples: of the reader.
      place: of its files, for messages.
    """

    def __init__(self, examples: Sequence[Example], place: str):
        self._examples, self._place = examples, place

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        index = range(len(self))[operator.index(index)]
        return example(self._examples, index, self._place)


def example(examples: Sequence[Example], index: int, place: str = "") -> Example:
    """One example of a reader, checked.

    Args:
      examples: of the reader.
      index: of the example; there is one.
      place: of the reader's files, for messages.

    Raises:
      UserError: the reader raises it or anything else, or makes no Example of texts.
    """
    try:
        return checked(examples[index])
    except UserError:
        raise
    except Exception as error:  # what broken files make a reader raise has no bounds
        what = f"cannot be read ({_told(error)})"
        raise UserError(what, field=f"{place}: record {index}" if place else "") from error


def opened(open_: Callable[[], Iterable[Example]], field: str, place: str) -> Sequence[Example]:
    """What a reader finds, guarded; at least one record of it can be read.

    Args:
      open_: opens the reader's files.
      field: of the source, for messages.
      place: of its files, for messages.

    Raises:
      UserError: no records, none that can be read, or the reader fails in any way.
    """
    try:
        found = open_()
        examples = found if isinstance(found, Sequence) else _listed(found)
        count = len(examples)
    except UserError:
        raise
    except Exception as error:  # as above
        raise UserError(f"cannot be opened ({_told(error)})", field=place) from error
    if not count:
        raise UserError("has no records", field=field, hint=f"Look at {place}")
    guarded = Guarded(examples, place)
    _check_any(guarded, place)
    return guarded


def checked(example: Example) -> Example:
    """The example, if its fields are texts that can be written.

    Raises:
      UserError: a field is no text, or was not UTF-8 in its file.
    """
    if not isinstance(example, Example):
        raise UserError(f"is {words.kind(example)}, not an Example")
    for name in FIELDS:
        _check(name, getattr(example, name), str(example.key))
    rounds = [text for pair in example.history for text in pair]
    texts = (example.instruction, example.answer, example.transcript, *example.references, *rounds)
    try:
        "".join(texts).encode("utf-8")
    except UnicodeEncodeError:
        paths = [path for _, path in example.media]
        file = ascii(next(iter(paths), example.key))[1:-1]
        raise UserError("its text is not UTF-8", field=file, hint="Save it as UTF-8") from None
    return example


def _check(name: str, value: Any, key: str) -> None:
    """Raises UserError where a field is no text, or no tuple of texts or of pairs of texts."""
    kind = FIELDS[name]
    parts = (value,) if kind == "a text" else value
    good = isinstance(parts, tuple | list)
    if good and kind == "pairs":
        good = all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in parts)
        parts = [text for pair in parts for text in pair] if good else ()
    if not (good and all(isinstance(text, str) for text in parts)):
        raise UserError(f"{name} is {words.kind(value)}, not {kind}", field=key)


def _listed(found: Iterable[Example]) -> Sequence[Example]:
    """Any other kind of collection; what can be asked for by number stays where it is."""
    if hasattr(found, "__getitem__") and hasattr(found, "__len__"):
        return found  # pyright: ignore[reportReturnType]
    return list(found)


def _check_any(examples: Sequence[Example], place: str) -> None:
    """Raises UserError where no record can be read, of all or of many spread over the source."""
    first = None
    for index in sampling.evenly(len(examples), LOOKED_AT):
        try:
            examples[index]
        except UserError as error:
            first = first or error
        else:
            return
    if first:
        what = f"none of its records can be read; the first: {first.what}"
        raise UserError(what, field=first.field or place, hint=first.hint)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:SHOWN]}"
