"""Sequences that hold offsets instead of records: millions of rows in a few NumPy arrays.

A record is read when it is asked for, so one broken row costs one record, never the whole file.
"""

from __future__ import annotations

import abc
import operator
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO, TypeVar

import numpy as np

from xllm_jax.core.errors import UserError
from xllm_jax.data.rows import csv_rows, files, json_spans, json_text

T = TypeVar("T")

CHUNK = 1 << 24  # bytes of a file looked at at once


class Lazy(Sequence[T]):
    """`make(0)` to `make(count - 1)`, made when they are asked for."""

    def __init__(self, count: int, make: Callable[[int], T]):
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> T:
        index = operator.index(index)
        if not -self._count <= index < self._count:
            raise IndexError(index)
        return self._make(index % self._count)


class Chain(Sequence[T]):
    """Several sequences as one."""

    def __init__(self, parts: Sequence[Sequence[T]]):
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> T:
        index = operator.index(index)
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        part = int(np.searchsorted(self._ends, index, side="right"))
        return self._parts[part][index - (int(self._ends[part - 1]) if part else 0)]


class FileRows(Sequence, abc.ABC):
    """Rows that are read from a file when they are asked for."""

    path: pathlib.Path

    @abc.abstractmethod
    def read(self, file: BinaryIO, index: int) -> Any:
        """One row of the opened file.

        Raises:
          UserError: it is broken.
        """

    @abc.abstractmethod
    def place(self, index: int) -> str:
        """Where a row is, for messages."""

    def __getitem__(self, index: int) -> Any:
        index = range(len(self))[index]
        with files.opened(self.path) as file:
            return self.read(file, index)

    def tried(self, places: Iterable[int] | None = None) -> Iterator[Any]:
        """Every row in order, or the UserError that says why not; the file is opened once.

        Args:
          places: of some rows alone.
        """
        with files.opened(self.path) as file:
            for index in range(len(self)) if places is None else places:
                try:
                    found = self.read(file, index)
                except UserError as error:
                    found = error
                yield found


class Lines(FileRows):
    """The lines of a text file, which end at newline characters alone; blank ones are left out.

    Args:
      path: the file.
      quoted: the rows of a CSV file instead, which may hold line breaks; only empty ones are left
        out, as the csv module does it.

    Raises:
      UserError: no such file; on access, a line that is not UTF-8.
    """

    def __init__(self, path: str | os.PathLike, quoted: bool = False):
        self.path, self._quoted = pathlib.Path(path), quoted
        with files.opened(path) as file:
            ends = csv_rows.row_ends(file) if quoted else _line_ends(file)
            starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
            kept = ends - starts > 2  # a line end has two bytes at most; look into shorter lines
            for index in np.flatnonzero(~kept):
                file.seek(int(starts[index]))
                content = file.read(int(ends[index] - starts[index]))
                kept[index] = bool(content.strip(b"\r\n" if quoted else None))
        self._starts, self._ends = starts[kept], ends[kept]

    def __len__(self) -> int:
        return len(self._starts)

    def place(self, index: int) -> str:
        """Where a line is, for messages."""
        return f"{self.path}: row {index + 1}"

    def ends_open(self, file: BinaryIO) -> bool:
        """Whether the file ends in its last line, inside a list, object or string of JSON."""
        end = int(self._ends[-1])
        file.seek(start := max(int(self._starts[-1]), end - files.MOST))
        content = file.read(end - start).decode("latin-1")
        return not content.endswith("\n") and json_spans.unfinished(content)

    def read(self, file: BinaryIO, index: int) -> str:
        """One line without its end, which a row of CSV keeps: see `FileRows.read`."""
        start, end = int(self._starts[index]), int(self._ends[index])
        text = files.part(file, start, end, self.place(index)).removeprefix("\ufeff")
        return text if self._quoted else text.removesuffix("\n").removesuffix("\r")


class Spans(FileRows):
    """JSON values of a file by their places (`json_spans.Rows.spans`).

    Args:
      path: the file.
      spans: `[rows, 2]` int64, first byte and end.
      name: of the list, for messages.

    Raises:
      UserError: on access, a row that is broken or not UTF-8.
    """

    def __init__(self, path: str | os.PathLike, spans: np.ndarray, name: str = ""):
        self.path, self._spans, self._name = pathlib.Path(path), spans, name

    def __len__(self) -> int:
        return len(self._spans)

    def place(self, index: int) -> str:
        """Where a row is, for messages."""
        return f"{self.path}: {self._name}[{index}]"

    def several(self, places: Sequence[int]) -> list[Any]:
        """Some rows; the file is opened once."""
        with files.opened(self.path) as file:
            return [self.read(file, index) for index in places]

    def read(self, file: BinaryIO, index: int) -> Any:
        """One value, see `FileRows.read`."""
        start, end = self._spans[index].tolist()
        where = self.place(index)
        if index == len(self) - 1 and end == file.seek(0, os.SEEK_END):  # no bracket behind it
            raise _cut_off(index, where)
        return json_text.parsed(files.part(file, start, end, where), where)


class JsonLines(FileRows):
    """The values of a file with one JSON value a line (.jsonl).

    Raises:
      UserError: no such file; on access, a row that is broken or not UTF-8.
    """

    def __init__(self, path: str | os.PathLike):
        self.path, self._lines = pathlib.Path(path), Lines(path)

    def __len__(self) -> int:
        return len(self._lines)

    def place(self, index: int) -> str:
        """Where a row is, for messages."""
        return f"{self.path}: [{index}]"

    def read(self, file: BinaryIO, index: int) -> Any:
        """One value, see `FileRows.read`."""
        try:
            return json_text.parsed(self._lines.read(file, index), self.place(index))
        except UserError:
            if index == len(self) - 1 and self._lines.ends_open(file):
                raise _cut_off(index, self.place(index)) from None
            raise


class Rows(FileRows):
    """The objects of a JSON list, or of a file with one JSON value a line (.jsonl).

    Args:
      path: the file.
      measure: a number to be known of every row; the texts it meets are not yet UTF-8, and it meets
        None where a row is broken.
      name: keys of the list where it is not the file itself, as 'data.dialogs'.
      objects: an object will do for a list; its members are the rows.

    Attributes:
      measures: `[rows]` int64, what `measure` said.
      names: keys of the rows of an object; None for a list.

    Raises:
      UserError: no such file, or no JSON list; on access, a row that is broken or not UTF-8.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        measure: Callable[[Any], int] | None = None,
        name: str = "",
        objects: bool = False,
    ):
        self.path = pathlib.Path(path)
        self.names: list[str] | None = None
        if self.path.suffix.lower() == ".jsonl":
            self._rows: FileRows = JsonLines(path)
            rows = self._rows.tried() if measure else ()
            notes = [measure(None if isinstance(x, UserError) else x) for x in rows if measure]
        else:
            note = measure and (lambda row, number: measure(row))
            found = json_spans.find(self.path, {name: note}, objects)[name]
            self._rows, self.names, notes = Spans(path, found.spans, name), found.names, found.notes
        self.measures = np.asarray(notes, np.int64)

    def __len__(self) -> int:
        return len(self._rows)

    def place(self, index: int) -> str:
        """Where a row is, for messages."""
        return (
            f"{self.path}: {self.names[index]}"
            if self.names and self.names[index]
            else self._rows.place(index)
        )

    def read(self, file: BinaryIO, index: int) -> Any:
        """One row, see `FileRows.read`."""
        return self._rows.read(file, index)


class Table(FileRows):
    """Rows of a CSV or TSV file as {column: text}, its first line naming the columns.

    The fields of a TSV (.tsv, .txt) end at tabs and its rows at newlines, and quotes are letters
    like any other; a CSV is read as the csv module reads it.

    Raises:
      UserError: no such file, or no such columns; on access, a row with more or fewer fields.
    """

    def __init__(self, path: str | os.PathLike, columns: Sequence[str] = ()):
        self.path = pathlib.Path(path)
        self._tabs = self.path.suffix.lower() in (".tsv", ".txt")
        self._lines = Lines(path, quoted=not self._tabs)
        self.columns = self._split(self._lines[0], 0) if len(self._lines) else []
        for column in columns:
            if column not in self.columns:
                hint = f"The first line names the columns; found: {', '.join(self.columns)[:200]}"
                raise UserError(f"no column {column!r}", field=str(path), hint=hint)

    def __len__(self) -> int:
        return max(len(self._lines) - 1, 0)

    def place(self, index: int) -> str:
        """Where a row is, for messages."""
        return self._lines.place(index + 1)

    def read(self, file: BinaryIO, index: int) -> dict[str, str]:
        """One row, see `FileRows.read`."""
        fields = self._split(self._lines.read(file, index + 1), index + 1)
        if len(fields) != len(self.columns):
            what = f"has {len(fields)} fields for {len(self.columns)} columns"
            raise UserError(what, field=self.place(index))
        return dict(zip(self.columns, fields))

    def _split(self, text: str, line: int) -> list[str]:
        return text.split("\t") if self._tabs else csv_rows.fields(text, self._lines.place(line))


def _cut_off(index: int, where: str) -> UserError:
    return UserError(f"the file ends inside record {index}", field=where, hint="Fetch it again")


def _line_ends(file: BinaryIO) -> np.ndarray:
    """`[lines]` int64: where each line ends, its line break included."""
    found, offset = [], 0
    while chunk := file.read(CHUNK):
        found.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + (offset + 1))
        offset += len(chunk)
    ends = np.concatenate([*found, np.zeros(0, np.int64)])
    return ends if len(ends) and ends[-1] == offset else np.append(ends, offset)
