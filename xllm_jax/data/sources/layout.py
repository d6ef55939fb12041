"""What the readers share: finding and reading annotation files, with errors that name the place."""

from __future__ import annotations

import json
import os
import pathlib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from xllm_jax.core.errors import UserError
from xllm_jax.data.example import Example

Examples = TypeVar("Examples", bound=Sequence[Example])
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
SOUNDS = (".wav", ".flac", ".ogg", ".mp3", ".opus")
BROKEN = re.compile("[\ud800-\udfff]")  # what 'surrogateescape' makes of a byte that is not UTF-8
FEW = 10  # one line in so many may be broken before a file is refused
VIDEOS = (".mp4", ".webm", ".mkv", ".avi", ".mov")


def read_text(path: pathlib.Path, table: bool = True) -> str:
    """The file's text; `table` says that it holds many records, not one.

    Single bytes that are not UTF-8 become lone surrogates: `stream.draw` finds them in the records
    that hold them, and the others of the file can be used.

    Raises:
      UserError: no such file, or one that is written in another encoding altogether.
    """
    try:
        text = path.read_text("utf-8-sig", "surrogateescape")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        hint = "Check data.root and the source's path, or see the reader's docstring"
        raise UserError("no such file", field=str(path), hint=hint) from None
    lines = text.splitlines() if table and BROKEN.search(text) else []
    broken = [number for number, line in enumerate(lines, start=1) if BROKEN.search(line)]
    if len(broken) > len(lines) // FEW:
        what = f"is not UTF-8 text in {len(broken)} of {len(lines)} lines, first in {broken[0]}"
        raise UserError(what, field=str(path), hint="Save the file as UTF-8")
    return text


def read_json(path: pathlib.Path) -> Any:
    """The file's JSON value.

    Raises:
      UserError: no such file, or broken JSON.
    """
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        what = f"broken JSON at line {error.lineno}, column {error.colno}: {error.msg}"
        raise UserError(what, field=str(path), hint="Fetch or write the file again") from None


def read_json_lines(path: pathlib.Path) -> list:
    """The JSON values of the file's lines, blank ones left out.

    Raises:
      UserError: no such file, or a line that is not JSON.
    """
    found = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        try:
            found += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            what = f"broken JSON at line {number}, column {error.colno}: {error.msg}"
            raise UserError(what, field=str(path), hint="One JSON object a line") from None
    return found


def get(record: Any, name: str, kind: type | tuple[type, ...], where: str) -> Any:
    """`record[name]`, checked.

    Args:
      record: a JSON object.
      name: its key.
      kind: type, or types, that the value may have.
      where: place for the message, such as 'captions.json: annotations[3]'.

    Raises:
      UserError: not an object, no such key, or a value of another type.
    """
    if not isinstance(record, dict):
        raise UserError(f"is {_kind(record)}, not an object", field=where)
    if name not in record:
        found = ", ".join(sorted(map(str, record))[:8]) or "none"
        hint = f"Keys found: {found}"
        raise UserError("missing key", field=f"{where}.{name}", hint=hint)
    value = record[name]
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wanted = " or ".join(_NAMES.get(one, one.__name__) for one in kinds)
        raise UserError(f"is {_kind(value)}, not {wanted}", field=f"{where}.{name}")
    return value


_NAMES = {str: "a text", int: "a number", list: "a list", dict: "an object"}


def _kind(value: Any) -> str:
    return _NAMES.get(type(value), type(value).__name__)


def rows(value: Any, where: str) -> list:
    """The value, checked to be a list.

    Raises:
      UserError: it is not.
    """
    if not isinstance(value, list):
        raise UserError(f"is {_kind(value)}, not a list", field=where)
    return value


def tags(record: dict) -> tuple[str, ...]:
    """The record's tags; published sets have none."""
    return tuple(map(str, record.get("tags", ())))


def split_folder(root: pathlib.Path, split: str) -> pathlib.Path:
    """`root/split`, or for 'train' the root itself, for sets that are published without splits.

    Raises:
      UserError: there is no such split.
    """
    if (root / split).is_dir():
        return root / split
    if split != "train":
        hint = f"Make a folder {split} with the same layout, or leave this split out"
        raise UserError("no such folder", field=str(root / split), hint=hint)
    return root


def first_folder(candidates: Iterable[pathlib.Path]) -> pathlib.Path:
    """The first folder that exists.

    Raises:
      UserError: none does.
    """
    candidates = list(candidates)
    for folder in candidates:
        if folder.is_dir():
            return folder
    others = ", ".join(map(str, candidates[1:]))
    hint = f"Looked also for {others}" if others else ""
    raise UserError("no such folder", field=str(candidates[0]), hint=hint)


def files(folders: Iterable[pathlib.Path], suffixes: Sequence[str]) -> dict[str, str]:
    """{stem: path} of all files with one of the suffixes, sub-folders included.

    A file name counts once: the first folder that has it wins.
    """
    found: dict[str, str] = {}
    for folder in folders:
        for place, inner, names in os.walk(folder):
            inner.sort()
            for name in sorted(names):
                stem, suffix = os.path.splitext(name)
                if suffix.lower() in suffixes:
                    found.setdefault(stem, os.path.join(place, name))
    return found


def unpunctuated(text: str) -> str:
    """The text without punctuation, as a transcript of speech has it."""
    return "".join(c for c in text if not unicodedata.category(c).startswith("P")).strip()


def captioned(
    key: str,
    media: tuple[tuple[str, str], ...],
    captions: Sequence[str],
    task: str,
    per_caption: bool,
    tags: tuple[str, ...] = (),
) -> list[Example]:
    """Examples of one captioned file: one for each caption, or one with the first as its answer.

    Both carry all captions as references.
    """
    said = tuple(captions)
    chosen = said if per_caption else said[:1]
    return [
        Example(
            f"{key}#{number}" if per_caption else key,
            media,
            answer=caption,
            task=task,
            references=said,
            tags=tags,
        )
        for number, caption in enumerate(chosen)
    ]


def not_empty(examples: Examples, place: pathlib.Path | str, what: str) -> Examples:
    """The examples, if there are any.

    Raises:
      UserError: there are none.
    """
    if not len(examples):
        raise UserError(f"has no {what}", field=str(place), hint="Check the path and the split")
    return examples


def captioned_image(key: str, path: str, caption: str, where: str) -> Example:
    """One image and its one caption.

    Raises:
      UserError: the caption is empty.
    """
    said = caption.strip()
    if not said:
        raise UserError("has an empty caption", field=where)
    return Example(key, (("image", path),), answer=said, task="caption", references=(said,))
