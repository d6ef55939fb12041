"""Where the rows of a JSON file stand, without keeping the rows: offsets into lists of any depth.

The file is read in pieces as Latin-1, one character a byte, which leaves JSON's own signs as they
are; so memory holds one piece, one row, and a few numbers for every row.
"""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from xllm_jax.core.errors import UserError

CHUNK = 1 << 24  # bytes of a file looked at at once
SPACE = re.compile(r"[ \t\r\n]*")
ENDS = tuple(",:]}")
MEND = "Check data.root and the source's path, or see the reader's docstring"
MARK = "\xef\xbb\xbf"  # of UTF-8, read as Latin-1

Note = Callable[[Any, int], Any] | None  # from (row, its number) to what shall be kept of it


class Rows:
    """The rows of one list: `spans` `[rows, 2]` int64 (first byte and end) and their notes."""

    def __init__(self, note: Note):
        self._note, self._spans, self.notes = note, bytearray(), []
        self.spans = np.zeros((0, 2), np.int64)

    def add(self, start: int, end: int, value: Any) -> None:
        """Takes down one row."""
        self._spans += start.to_bytes(8, "little") + end.to_bytes(8, "little")
        if self._note is not None:
            self.notes.append(self._note(value, len(self.notes)))

    def close(self) -> Rows:
        """Makes the spans an array."""
        self.spans = np.frombuffer(bytes(self._spans), "<i8").reshape(-1, 2)
        self._spans = bytearray()
        return self


def find(path: pathlib.Path, wanted: Mapping[str, Note]) -> dict[str, Rows]:
    """The rows of some lists of a JSON file.

    Args:
      path: the file.
      wanted: {place: note}; a place is '' for the file's own list, or keys such as 'data.dialogs'.
        Texts that a note meets are not yet UTF-8.

    Raises:
      UserError: the file is no list or object where one is wanted, a list is missing, or the JSON
        is broken.
    """
    if not path.is_file():
        raise UserError("no such file", field=str(path), hint=MEND)
    found = {place: Rows(note) for place, note in wanted.items()}
    seen: set[str] = set()
    with open(path, encoding="latin-1", newline="") as file:
        scanner = _Scanner(file, path)
        scanner.skip(MARK)
        _value(scanner, "", found, seen)
        if scanner.peek():
            raise scanner.broken()
    for place in found.keys() - seen:
        where = f"{path}: {place}" if place else str(path)
        raise UserError("is missing, or not a JSON list", field=where, hint="[{…}, {…}, …]")
    return {place: rows.close() for place, rows in found.items()}


def _value(scanner: _Scanner, place: str, found: Mapping[str, Rows], seen: set[str]) -> None:
    """Goes over one value: a wanted list, an object with one in it, or one that is passed over."""
    sign = scanner.peek()
    if place in found and sign == "[":
        seen.add(place)
        for _ in scanner.members("[", "]"):
            found[place].add(*scanner.value())
    elif sign == "{" and any(other.startswith(_below(place)) for other in found):
        for _ in scanner.members("{", "}"):
            _value(scanner, _below(place) + scanner.key(), found, seen)
    elif sign == "[":
        for _ in scanner.members("[", "]"):  # row by row, since it may be long
            scanner.value()
    elif sign:
        scanner.value()


def _below(place: str) -> str:
    return f"{place}." if place else ""


class _Scanner:
    """A place in a JSON file that moves on; `text` holds what is read and not yet passed."""

    def __init__(self, file: Any, path: pathlib.Path):
        self._file, self._path, self._decoder = file, path, json.JSONDecoder()
        self._text, self._base, self._at, self._ended = "", 0, 0, False
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
                raise self.broken()
            yield sign
            if self.peek() == ",":
                self._at += 1
            elif self.peek() != closing:
                raise self.broken()
        self._at += 1

    def key(self) -> str:
        """Passes a key and its colon."""
        _, _, name = self.value()
        if not isinstance(name, str) or self.peek() != ":":
            raise self.broken()
        self._at += 1
        return name

    def value(self) -> tuple[int, int, Any]:
        """Passes a value: (first byte, end, value)."""
        self.peek()
        while True:
            value, length = self._decoded()
            behind = _behind_space(self._text, self._at + length)
            # A number is whole once something stands behind it that ends it.
            whole = length and self._text[behind : behind + 1] in ENDS
            if whole or not self._more():
                if not length:
                    raise self.broken()
                start = self._base + self._at
                self._at += length
                return start, start + length, value

    def _decoded(self) -> tuple[Any, int]:
        """The value that stands here and its length, 0 where it is cut off or broken."""
        try:
            value, end = self._decoder.raw_decode(self._text, self._at)
        except json.JSONDecodeError:
            return None, 0
        return value, end - self._at

    def broken(self) -> UserError:
        """What to raise here."""
        what = f"broken JSON at byte {self._base + self._at}"
        return UserError(what, field=str(self._path), hint="Fetch or write the file again")

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
