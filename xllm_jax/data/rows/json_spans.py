"""Where the rows of a JSON file stand, without keeping the rows: offsets into lists of any depth.

The file is read in pieces as Latin-1, one character a byte, which leaves JSON's own signs as they
are; so memory holds one piece, one row, and a few numbers for every row. A row that is no JSON
though its brackets show where it ends (`{"a": tru}`, a number of 5000 digits) is a row like any
other: it is reported when it is read. So is what stands in the place of the row inside which a file
ends that was not fetched to its end.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, TextIO

import numpy as np

from xllm_jax.core.errors import UserError
from xllm_jax.data.rows import files

CHUNK = 1 << 24  # bytes of a file looked at at once
SPACE = re.compile(r"[ \t\r\n]*")
ENDS = tuple(",:]}")
TEXT = r'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
BRACKET = re.compile(rf'{TEXT}|["\[\]{{}}]', re.DOTALL)  # strings are passed over
SCALAR = re.compile(rf'{TEXT}|[^",:\[\]{{}}\s]+', re.DOTALL)
CUT = ""  # stands for the name of a member that the file ends inside of
MARK = "\xef\xbb\xbf"  # of UTF-8, read as Latin-1

# From (row, its number) to what shall be kept of it; the row is None where it is no JSON.
Note = Callable[[Any, int], Any] | None


class Rows:
    """The rows of one list: `spans` `[rows, 2]` int64 (first byte and end) and their notes.

    Of an object its members are the rows, and `names` their keys; of a list it is None.
    """

    def __init__(self, note: Note):
        self._note, self._spans, self.notes = note, bytearray(), []
        self.spans = np.zeros((0, 2), np.int64)
        self.names: list[str] | None = None

    @property
    def count(self) -> int:
        """Rows that were taken down."""
        return len(self._spans) // 16

    def add(self, start: int, end: int, value: object) -> None:
        """Takes down one row."""
        self._spans += start.to_bytes(8, "little") + end.to_bytes(8, "little")
        if self._note is not None:
            self.notes.append(self._note(value, len(self.notes)))

    def close(self) -> Rows:
        """Makes the spans an array."""
        self.spans = np.frombuffer(bytes(self._spans), "<i8").reshape(-1, 2)
        self._spans = bytearray()
        return self


def find(
    path: str | os.PathLike, wanted: Mapping[str, Note], objects: bool = False
) -> dict[str, Rows]:
    """The rows of some lists of a JSON file.

    Args:
      path: the file.
      wanted: {place: note}; a place is '' for the file's own list, or keys such as 'data.dialogs'.
        Texts that a note meets are not yet UTF-8.
      objects: an object in the place of a list will do, and its members are the rows.

    Raises:
      UserError: the file is no list or object where one is wanted, a list is missing, the JSON is
        so broken that its rows cannot be told apart, or the file ends before the first row.
    """
    found = {place: Rows(note) for place, note in wanted.items()}
    seen: set[str] = set()
    with io.TextIOWrapper(files.opened(path), "latin-1", newline="") as file:
        scanner = _Scanner(file, str(path))
        scanner.skip(MARK)
        walk = _Walk(scanner, found, seen, objects)
        try:
            walk.value("")
            if scanner.peek():
                raise scanner.broken()
        except CutOff as cut:
            if found.keys() != seen:
                raise
            walk.cut_off(cut)
    for place in found.keys() - seen:
        where = f"{path}: {place}" if place else str(path)
        raise UserError("is missing, or not a JSON list", field=where, hint="[{…}, {…}, …]")
    return {place: rows.close() for place, rows in found.items()}


class CutOff(UserError):
    """A JSON file ends in the middle.

    Args:
      path: of the file.
      start: byte where the value begins that is not whole.
      end: bytes of the file.
    """

    def __init__(self, path: str, start: int, end: int):
        hint = "Fetch or write the file again"
        super().__init__(f"the file is cut off at byte {end}", field=path, hint=hint)
        self.start, self.end = start, end


def unfinished(text: str) -> bool:
    """Whether a text ends inside a JSON list, object or string."""
    depth = 0
    for found in BRACKET.finditer(text):
        if (sign := found.group()) == '"':
            return True
        depth += (sign in ("[", "{")) - (sign in ("]", "}"))
    return depth > 0


class _Walk:
    """Goes over the values of a file: wanted lists, objects with one in them, and all others."""

    def __init__(self, scanner: _Scanner, found: dict[str, Rows], seen: set[str], objects: bool):
        self._scanner, self._found, self._seen, self._objects = scanner, found, seen, objects
        self._open: Rows | None = None  # the wanted list that is gone over

    def value(self, place: str) -> None:
        """Passes the value that stands at a place."""
        sign, rows = self._scanner.peek(), self._found.get(place)
        if rows and (sign == "[" or (sign == "{" and self._objects)):
            self._seen.add(place)
        if sign == "[":
            self._list(rows)
        elif sign == "{" and rows and self._objects:
            self._object(rows)
        elif sign == "{":
            inside = any(other.startswith(_below(place)) for other in self._found)
            for _ in self._scanner.members("{", "}"):
                name = self._scanner.key()
                self.value(_below(place) + name) if inside else self._scanner.value()
        elif sign:
            self._scanner.value()

    def cut_off(self, cut: CutOff) -> None:
        """Takes down what is left of the row inside which the file ends, if it is a wanted one."""
        if (rows := self._open) is not None:
            rows.add(cut.start, cut.end, None)
            if rows.names is not None:
                rows.names += [CUT] * (rows.count - len(rows.names))
        logging.getLogger(__name__).warning("%s; what stands before is read", cut)

    def _list(self, rows: Rows | None) -> None:
        self._open = rows
        for _ in self._scanner.members("[", "]"):  # row by row, since it may be long
            start, end, value = self._scanner.value()
            if rows is not None:
                rows.add(start, end, value)
        self._open = None

    def _object(self, rows: Rows) -> None:
        self._open, rows.names = rows, []
        for _ in self._scanner.members("{", "}"):
            rows.names.append(self._scanner.key())
            rows.add(*self._scanner.value())
        self._open = None


def _below(place: str) -> str:
    return f"{place}." if place else ""


class _Scanner:
    """A place in a JSON file that moves on; `text` holds what is read and not yet passed."""

    def __init__(self, file: TextIO, path: str):
        self._file, self._path, self._decoder = file, path, json.JSONDecoder()
        self._text, self._base, self._at, self._ended = "", 0, 0, False
        self._broken = False  # whether a value was no JSON; then brackets come first
        self._more()

    def skip(self, mark: str) -> None:
        """Passes a mark, if it is there."""
        while len(self._text) < len(mark) and self._more():
            pass
        self._at += len(mark) * self._text.startswith(mark, self._at)

    def peek(self) -> str:
        """The next sign, spaces passed; '' at the end."""
        while True:
            self._at = _behind_space(self._text, self._at)
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def members(self, opening: str, closing: str) -> Any:
        """Stops before each member of a list or object, which must be passed by then."""
        if self.peek() != opening:
            raise self.broken()
        self._at += 1
        while (sign := self.peek()) != closing:
            if not sign:
                raise self._cut_off()
            yield sign
            if self.peek() == ",":
                self._at += 1
            elif self.peek() != closing:
                raise self.broken() if self.peek() else self._cut_off()
        self._at += 1

    def key(self) -> str:
        """Passes a key and its colon; returns it as it is meant, in Unicode."""
        start, end, name = self.value()
        raw = self._text[self._at - (end - start) : self._at]
        if not isinstance(name, str) or self.peek() != ":":
            raise self.broken() if self.peek() else self._cut_off()
        self._at += 1
        return json.loads(raw.encode("latin-1").decode("utf-8", "surrogateescape"), strict=False)

    def value(self) -> tuple[int, int, Any]:
        """Passes a value: (first byte, end, value or None where it is no JSON)."""
        self.peek()
        value, length = (None, 0) if self._broken else self._decoded()
        behind = _behind_space(self._text, self._at + length)
        # A number is whole once something stands behind it that ends it.
        if not length or self._text[behind : behind + 1] not in ENDS:
            length = self._whole()
            value, found = self._decoded(length)
            value, self._broken = (value, self._broken) if found == length else (None, True)
        start = self._base + self._at
        self._at += length
        return start, start + length, value

    def _whole(self) -> int:
        """Reads on until a value is there to its end, as its brackets show; returns its length."""
        if self.peek() not in ("[", "{"):
            return self._whole_scalar()
        depth, length = 0, 0
        while True:
            found = BRACKET.search(self._text, self._at + length)
            sign = found.group() if found else ""
            if found is None or sign == '"':  # a string that goes on
                length = (found.start() if found else len(self._text)) - self._at
                self._go_on()
                continue
            depth += (sign in ("[", "{")) - (sign in ("]", "}"))
            length = found.end() - self._at
            if not depth:
                return length

    def _whole_scalar(self) -> int:
        while True:
            found = SCALAR.match(self._text, self._at)
            if found and (found.end() < len(self._text) or not self._more()):
                return found.end() - found.start()
            if not found:
                self._go_on()

    def _go_on(self) -> None:
        """Reads on in the middle of a value."""
        if len(self._text) - self._at > files.MOST:
            raise self.broken()
        if not self._more():
            raise self._cut_off()

    def _decoded(self, length: int = 0) -> tuple[Any, int]:
        """The value that stands here and its length, 0 where it is cut off or broken.

        Args:
          length: of the value, where it is known: errors count the lines of all that they see.
        """
        start = 0 if length else self._at
        text = self._text[self._at : self._at + length] if length else self._text
        try:
            value, end = self._decoder.raw_decode(text, start)
        except (ValueError, RecursionError):  # of broken JSON, too many digits, deep nesting
            return None, 0
        return value, end - start

    def broken(self) -> UserError:
        """What to raise here."""
        what = f"broken JSON at byte {self._base + self._at}"
        return UserError(what, field=str(self._path), hint="Fetch or write the file again")

    def _cut_off(self) -> CutOff:
        """What to raise where the file ends here, in the middle."""
        start = self._base + self._at
        return CutOff(self._path, start, self._base + len(self._text))

    def _more(self) -> bool:
        """Reads on, and forgets what is passed."""
        chunk = "" if self._ended else self._file.read(CHUNK)
        self._ended = not chunk
        self._base += self._at
        self._text, self._at = self._text[self._at :] + chunk, 0
        return bool(chunk)


def _behind_space(text: str, start: int) -> int:
    """Where the spaces that begin at `start`, if any do, end."""
    found = SPACE.match(text, start)
    return found.end() if found else start
