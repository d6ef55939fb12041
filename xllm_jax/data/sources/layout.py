"""What the readers share: finding and reading annotation files, with errors that name the place."""

from __future__ import annotations

import os
import pathlib
import unicodedata
from collections.abc import Iterable, Sequence, Sized
from typing import Any, TypeVar

from xllm_jax.core import litter, words
from xllm_jax.core.errors import UserError
from xllm_jax.data.example import Example
from xllm_jax.data.rows import files as files_of_rows
from xllm_jax.data.rows import json_text
from xllm_jax.data.rows.joined_lists import Groups
from xllm_jax.data.rows.lazy import Lazy

Examples = TypeVar("Examples", bound=Sequence[Example])
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
SOUNDS = (".wav", ".flac", ".ogg", ".mp3", ".opus")
TOGETHER = 1000  # rounds of a talk, captions of an image: a record has no more
VIDEOS = (".mp4", ".webm", ".mkv", ".avi", ".mov")


def read_text(path: pathlib.Path) -> str:
    """The text of a small file.

    Bytes that are not UTF-8 become lone surrogates: `mixture.draw` finds them in the records that
    hold them.

    Raises:
      UserError: no such file, it cannot be read, or it is larger than a row may be.
    """
    with files_of_rows.opened(path) as file:
        content = file.read(files_of_rows.MOST + 1)
    if len(content) > files_of_rows.MOST:
        what = f"has more than {files_of_rows.MOST:,} bytes, and is read as a whole"
        raise UserError(what, field=str(path), hint="Cut it into several files")
    return content.decode("utf-8-sig", "surrogateescape")


def read_json(path: pathlib.Path) -> Any:
    """The JSON value of a small file.

    Raises:
      UserError: as `read_text`, or broken JSON.
    """
    return json_text.parsed(read_text(path), str(path))


def get(record: object, name: str, kind: type | tuple[type, ...], where: str) -> Any:
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
        raise UserError(f"is {words.kind(record)}, not an object", field=where)
    if name not in record:
        found = ", ".join(sorted(map(str, record))[:8]) or "none"
        hint = f"Keys found: {found}"
        raise UserError("missing key", field=f"{where}.{name}", hint=hint)
    value = record[name]
    if not isinstance(value, kind) or isinstance(value, bool):
        what = f"is {words.kind(value)}, not {words.wanted(kind)}"
        raise UserError(what, field=f"{where}.{name}")
    return value


def text(record: object, name: str, where: str) -> str:
    """`record[name]`, a text of more than spaces, without those around it.

    Raises:
      UserError: as `get`, or it is empty.
    """
    found = get(record, name, str, where).strip()
    if not found:
        raise UserError(f"has an empty {name}", field=f"{where}.{name}")
    return found


def tags(record: dict, name: str = "tags") -> tuple[str, ...]:
    """The record's tags; published sets have none.

    Raises:
      UserError: they are no list.
    """
    found = record.get(name) or []
    if not isinstance(found, list):
        raise UserError(f"is {words.kind(found)}, not a list", field=name)
    return tuple(map(str, found))


def said(
    rows: Sequence[object], number: int | None, name: str, where: str
) -> tuple[tuple[str, ...], int]:
    """The captions of one image or video, broken and empty ones left out: they cost their own
    record, and the others stand without them.

    Args:
      rows: its annotations: texts, objects with a text in `name`, or UserErrors of broken ones.
      number: of the row that is asked for; None for any.
      name: key of the text in an object.
      where: place for messages.

    Returns:
      (the texts, which of them is the row's).

    Raises:
      UserError: the row has no text, or none has one.
    """
    texts = [row.get(name) if isinstance(row, dict) else row for row in rows]
    good = [isinstance(text, str) and bool(text.strip()) for text in texts]
    if not any(good):
        number = 0
    if number is not None and not (number < len(good) and good[number]):
        row = rows[number] if rows else None
        if isinstance(row, UserError):
            raise row
        text = get(row, name, str, where) if isinstance(row, dict) else row
        what = (
            "has an empty caption"
            if isinstance(text, str)
            else f"is {words.kind(text)}, not a text"
        )
        raise UserError(what, field=where)
    found = tuple(str(text).strip() for text, one in zip(texts, good) if one)
    return found, sum(good[: number or 0])


def grouped(
    groups: Groups, group: int, number: int | None
) -> tuple[tuple[str, ...], int, tuple[str, ...]]:
    """The captions of a group, which of them is the number-th row's, and their tags; see `said`.

    Raises:
      UserError: as `said`.
    """
    members = groups.members(group)
    check_few(members, groups.below.place(members[0]))
    rows = list(groups.below.tried(members))
    found, at = said(rows, number, "caption", groups.below.place(members[number or 0]))
    return found, at, tags(next(row for row in rows if isinstance(row, dict)))


def few(parts: Sized) -> bool:
    """Whether a record has no more rounds, captions or regions than published sets ever have; each
    of them is an example that reads all of them."""
    return len(parts) <= TOGETHER


def check_few(parts: Sized, where: str) -> None:
    """Raises UserError where there are not `few`."""
    if not few(parts):
        raise UserError(f"has {len(parts):,} parts, and a record at most {TOGETHER:,}", field=where)


def with_broken(examples: Sequence[Example], broken: Sequence[UserError]) -> Sequence[Example]:
    """The examples, and behind them a place for every row that is none: reading it says why.

    Raises:
      UserError: there are broken rows alone; that of the first.
    """
    if broken and not len(examples):
        raise broken[0]

    def at(index: int) -> Example:
        if index < len(examples):
            return examples[index]
        error = broken[index - len(examples)]
        raise UserError(error.what, field=error.field, hint=error.hint)

    return Lazy(len(examples) + len(broken), at) if broken else examples


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


def first_file(root: pathlib.Path, names: Sequence[str]) -> pathlib.Path:
    """The file that a set is read from, under the first name or pattern that is there.

    Args:
      root: folder of the set.
      names: the publisher's first, then those of well-known mirrors.

    Raises:
      UserError: there is none; names what is there.
    """
    for name in names:
        for file in litter.glob(root, name):
            if file.is_file():
                return file
    raise files_of_rows.missing(root / names[0], names[1:])


def first_folder(candidates: Iterable[pathlib.Path]) -> pathlib.Path:
    """The first folder that exists.

    Raises:
      UserError: none does.
    """
    candidates = list(candidates)
    for folder in candidates:
        if folder.is_dir():
            return folder
    others, found = ", ".join(map(str, candidates[1:])), files_of_rows.names(candidates[0].parent)
    parts = [f"Looked also for {others}"] if others else []
    parts += [f"Found in {candidates[0].parent}: {found}"] if found else []
    hint = ". ".join(parts)
    raise UserError("no such folder", field=str(candidates[0]), hint=hint)


def files(folders: Iterable[pathlib.Path], suffixes: Sequence[str]) -> dict[str, str]:
    """{stem: path} of all files with one of the suffixes, sub-folders included.

    A file name counts once: the first folder that has it wins.
    """
    found: dict[str, str] = {}
    for folder in folders:
        for place, names in litter.walk(folder, lambda name: ending(name) in suffixes):
            for name in names:
                found.setdefault(os.path.splitext(name)[0], os.path.join(place, name))
    return found


def ending(name: str) -> str:
    """The suffix of a file's name, in small letters."""
    return os.path.splitext(name)[1].lower()


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
