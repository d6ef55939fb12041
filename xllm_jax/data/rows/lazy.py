"""Sequences that hold offsets instead of records: millions of rows in a few NumPy arrays.

A record is read when it is asked for, so one broken row costs one record, never the whole file.
"""

from __future__ import annotations

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
from xllm_jax.data.rows import json_spans

CHUNK = 1 << 24  # bytes of a file looked at at once
MEND = json_spans.MEND


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
            raise UserError("no such file", field=str(path), hint=MEND)
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


class Spans(Sequence):
    """JSON values of a file by their places (`json_spans.Rows.spans`).

    Args:
      path: the file.
      spans: `[rows, 2]` int64, first byte and end.
      name: of the list, for messages.

    Raises:
      UserError: on access, a row that is not UTF-8.
    """

    def __init__(self, path: str | os.PathLike, spans: np.ndarray, name: str = ""):
        self.path, self._spans, self._name = pathlib.Path(path), spans, name

    def __len__(self) -> int:
        return len(self._spans)

    def place(self, index: int) -> str:
        """Where a row is, for messages."""
        return f"{self.path}: {self._name}[{index}]"

    def __getitem__(self, index: int) -> Any:
        return self.several([range(len(self))[index]])[0]

    def several(self, places: Sequence[int]) -> list[Any]:
        """Some rows; the file is opened once."""
        found = []
        with open(self.path, "rb") as file:
            for index in places:
                start, end = self._spans[index].tolist()
                file.seek(start)
                found.append(json.loads(_text(file.read(end - start), self.place(index))))
        return found


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
            note = measure and (lambda row, number: measure(row))
            found = json_spans.find(self.path, {"": note})[""]
            self._spans, self.measures = Spans(path, found.spans), np.asarray(found.notes, np.int64)

    def __len__(self) -> int:
        return len(self._spans) if self._lines is None else len(self._lines)

    def place(self, index: int) -> str:
        """Where a row is, for messages."""
        return f"{self.path}: [{index}]"

    def __getitem__(self, index: int) -> Any:
        if self._lines is None:
            return self._spans[index]
        index = range(len(self))[index]
        try:
            return json.loads(self._lines[index])
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
                hint = f"The first line names the columns; found: {', '.join(self.columns)[:200]}"
                raise UserError(f"no column {column!r}", field=str(path), hint=hint)

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
    return np.asarray([os.fsencode(str(value)) for value in values])


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
