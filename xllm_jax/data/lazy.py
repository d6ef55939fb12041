"""Sequences that hold offsets instead of records: millions of rows in a few NumPy arrays.

A record is read when it is asked for, so one broken row costs one record, never the whole file.
"""

from __future__ import annotations

import array
import csv
import json
import operator
import os
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from xllm_jax.core.errors import UserError

CHUNK = 1 << 24  # bytes of a file looked at at once
SPACE = re.compile(r"[ \t\r\n]*")
START = re.compile(r"(?:\xef\xbb\xbf)?[ \t\r\n]*\[")  # a byte order mark may stand first
BEHIND = re.compile(r"[ \t\r\n]*(?:,|(?=\]))")
MEND = "Check data.root and the source's path, or see the reader's docstring"


class Lazy(Sequence):
    """`make(0)` to `make(count - 1)`, made when they are asked for."""

    def __init__(self, count: int, make: Callable[[int], Any]):
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Any:
        index = operator.index(index)
        if not -self._count <= index < self._count:
            raise IndexError(index)
        return self._make(index % self._count)


class Chain(Sequence):
    """Several sequences as one."""

    def __init__(self, parts: Sequence[Sequence]):
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> Any:
        index = operator.index(index)
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        part = int(np.searchsorted(self._ends, index, side="right"))
        return self._parts[part][index - (int(self._ends[part - 1]) if part else 0)]


class Lines(Sequence):
    """The lines of a text file, blank ones left out.

    Args:
      path: the file.
      quoted: line breaks inside double quotes belong to the line, as in CSV.

    Raises:
      UserError: no such file; on access, a line that is not UTF-8.
    """

    def __init__(self, path: str | os.PathLike, quoted: bool = False):
        self.path = pathlib.Path(path)
        if not self.path.is_file():
            raise UserError("no such file", field=str(path), mend=MEND)
        ends = _line_ends(self.path, quoted)
        starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
        kept = ends - starts > 2  # a line break has one or two bytes; shorter lines are looked into
        short = np.flatnonzero(~kept)
        kept[short] = [bool(_bytes(self.path, starts[i], ends[i]).strip()) for i in short]
        self._starts, self._ends = starts[kept], ends[kept]

    def __len__(self) -> int:
        return len(self._starts)

    def place(self, index: int) -> str:
        """Where a line is, for messages."""
        return f"{self.path}: row {index + 1}"

    def __getitem__(self, index: int) -> str:
        index = range(len(self))[index]
        found = _bytes(self.path, self._starts[index], self._ends[index])
        return _text(found, self.place(index)).strip("\r\n").removeprefix("\ufeff")


class Rows(Sequence):
    """The objects of a JSON list, or of a file with one JSON value a line (.jsonl).

    Args:
      path: the file.
      measure: a number to be known of every row of a list; the texts it meets are not yet UTF-8.

    Attributes:
      measures: `[rows]` int64, what `measure` said.

    Raises:
      UserError: no such file, or no JSON list; on access, a row that is broken or not UTF-8.
    """

    def __init__(self, path: str | os.PathLike, measure: Callable[[Any], int] | None = None):
        self.path = pathlib.Path(path)
        self._lines = Lines(path) if self.path.suffix == ".jsonl" else None
        if self._lines is None:
            if not self.path.is_file():
                raise UserError("no such file", field=str(path), mend=MEND)
            found = _json_spans(self.path, measure or (lambda row: 0))
            self._spans, self.measures = found[:, :2], found[:, 2]

    def __len__(self) -> int:
        return len(self._spans) if self._lines is None else len(self._lines)

    def place(self, index: int) -> str:
        """Where a row is, for messages."""
        return f"{self.path}: [{index}]"

    def __getitem__(self, index: int) -> Any:
        index = range(len(self))[index]
        if self._lines is None:
            text = _text(_bytes(self.path, *self._spans[index]), self.place(index))
        else:
            text = self._lines[index]
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            what = f"broken JSON at column {error.colno}: {error.msg}"
            raise UserError(what, field=self.place(index)) from None


class Table(Sequence):
    """Rows of a CSV (',') or TSV file as {column: text}, its first line naming the columns.

    Raises:
      UserError: no such file, or no such columns; on access, a row with more or fewer fields.
    """

    def __init__(self, path: str | os.PathLike, columns: Sequence[str] = ()):
        self._tabs = pathlib.Path(path).suffix in (".tsv", ".txt")
        self._lines = Lines(path, quoted=not self._tabs)
        self.columns = self._split(self._lines[0]) if len(self._lines) else []
        for column in columns:
            if column not in self.columns:
                mend = f"The first line names the columns; found: {', '.join(self.columns)[:200]}"
                raise UserError(f"no column {column!r}", field=str(path), mend=mend)

    def __len__(self) -> int:
        return max(len(self._lines) - 1, 0)

    def place(self, index: int) -> str:
        """Where a row is, for messages."""
        return self._lines.place(index + 1)

    def __getitem__(self, index: int) -> dict[str, str]:
        index = range(len(self))[index]
        fields = self._split(self._lines[index + 1])
        if len(fields) != len(self.columns):
            what = f"has {len(fields)} fields for {len(self.columns)} columns"
            raise UserError(what, field=self.place(index))
        return dict(zip(self.columns, fields))

    def _split(self, line: str) -> list[str]:
        return line.split("\t") if self._tabs else next(csv.reader([line]), [])


class Names:
    """The files of a folder and its sub-folders, found by a key of their names, in NumPy arrays.

    Args:
      folder: where to look.
      key: from a file's name to its key, a number or a text; None leaves the file out.
    """

    def __init__(self, folder: str | os.PathLike, key: Callable[[str], int | str | None]):
        self._folder, keys, paths = str(folder), [], []
        for place, inner, names in os.walk(folder):
            inner.sort()
            below = os.path.relpath(place, folder)
            found = [(key(name), name) for name in sorted(names)]
            found = [(one, os.path.normpath(os.path.join(below, name))) for one, name in found
                     if one is not None]  # fmt: skip
            if found:
                keys.append(_compact([one for one, _ in found]))
                paths.append(_compact([path for _, path in found]))
        self._keys = np.concatenate(keys) if keys else np.zeros(0, np.int64)
        order = np.argsort(self._keys, kind="stable")
        self._keys = self._keys[order]
        self._paths = (np.concatenate(paths) if paths else np.zeros(0, "S1"))[order]

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, keys: Sequence[int | str]) -> np.ndarray:
        """Place of each key among the files, -1 where there is none."""
        wanted = _compact(keys) if len(keys) else np.zeros(0, self._keys.dtype)
        if not len(self._keys) or wanted.dtype.kind != self._keys.dtype.kind:
            return np.full(len(wanted), -1)
        at = np.minimum(np.searchsorted(self._keys, wanted), len(self._keys) - 1)
        return np.where(self._keys[at] == wanted, at, -1)

    def path(self, at: int) -> str:
        """The file at a place that `find` gave."""
        return os.path.join(self._folder, os.fsdecode(bytes(self._paths[at])))


def number(name: str) -> int | None:
    """The number that a file's name starts with, as downloaders call the n-th picture of a list."""
    found = re.match(r"\d{1,18}(?=[._]|$)", name)
    return int(found.group()) if found else None


def _compact(values: Sequence[int | str]) -> np.ndarray:
    if isinstance(values, range) or isinstance(values[0], (int, np.integer)):
        return np.asarray(values, np.int64)
    return np.asarray([os.fsencode(value) for value in values])


def _bytes(path: pathlib.Path, start: int, end: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(int(start))
        return file.read(int(end) - int(start))


def _text(content: bytes, place: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"is not UTF-8 text ({error.reason})", field=place) from None


def _line_ends(path: pathlib.Path, quoted: bool) -> np.ndarray:
    """`[lines]` int64: where each line ends, its line break included."""
    found, offset, inside = [], 0, 0
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            data = np.frombuffer(chunk, np.uint8)
            ends = np.flatnonzero(data == ord("\n"))
            if quoted:
                quotes = np.flatnonzero(data == ord('"'))
                ends = ends[(np.searchsorted(quotes, ends) + inside) % 2 == 0]
                inside += len(quotes)
            found.append(ends + (offset + 1))
            offset += len(chunk)
    ends = np.concatenate([*found, np.zeros(0, np.int64)])
    return ends if len(ends) and ends[-1] == offset else np.append(ends, offset)


def _json_spans(path: pathlib.Path, measure: Callable[[Any], int]) -> np.ndarray:
    """`[rows, 3]` int64: first byte, end and measure of every element of a JSON list.

    The file is read as Latin-1, one character a byte, which leaves JSON's own signs as they are.
    """
    decoder, spans, base = json.JSONDecoder(), array.array("q"), 0
    with open(path, encoding="latin-1", newline="") as file:
        text = file.read(CHUNK)
        start = START.match(text)
        if not start:
            raise UserError("is not a JSON list", field=str(path), mend="[{…}, {…}, …]")
        at = start.end()
        while not text.startswith("]", at := SPACE.match(text, at).end()):
            value, end = _decoded(decoder, text, at)
            behind = BEHIND.match(text, end) if end else None
            if behind:
                spans.extend((base + at, base + end, measure(value)))
                at = behind.end()
            elif more := file.read(CHUNK):
                base, text, at = base + at, text[at:] + more, 0
            else:
                what = f"broken JSON in or behind element {len(spans) // 3}, byte {base + at}"
                raise UserError(what, field=str(path), mend="Fetch or write the file again")
    return np.asarray(spans, np.int64).reshape(-1, 3)


def _decoded(decoder: json.JSONDecoder, text: str, at: int) -> tuple[Any, int | None]:
    """The JSON value at `at` and where it ends, None where it is cut off or broken."""
    try:
        return decoder.raw_decode(text, at)
    except json.JSONDecodeError:
        return None, None
