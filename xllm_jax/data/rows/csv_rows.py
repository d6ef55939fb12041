"""Where the rows of a CSV file end, and their fields: as the csv module reads them, row for row.

A quote opens a field only where the field begins; elsewhere it is a letter like any other, as the
inch in `a 5" pipe`. Rows without quotes are found by their line ends alone, the others by the csv
module itself, so that no rule is written twice.
"""

from __future__ import annotations

import contextlib
import csv
import io
import re
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from xllm_jax.core.errors import UserError
from xllm_jax.data.rows.files import MOST

LINE = re.compile(rb"[^\r\n]*(?:\r\n|\r|\n|\Z)")
MARK = b"\xef\xbb\xbf"  # of UTF-8


def row_ends(file: BinaryIO) -> np.ndarray:
    """`[rows]` int64: where each row ends, its line end included. Empty rows count, too.

    Args:
      file: read from its start.
    """
    lines, found, offset = _lines(file), [], 0
    for line in lines:
        offset += len(line)
        if b'"' in line:
            offset += _rest(line, lines)
        found.append(offset)
    return np.asarray(found, np.int64)


def fields(row: str, where: str) -> list[str]:
    """The fields of one row.

    Args:
      row: its text, line breaks inside quotes included.
      where: place for messages.

    Raises:
      UserError: the csv module refuses it, as a field above its limit of 131,072 characters.
    """
    try:
        return next(csv.reader(io.StringIO(row, newline="")), [])
    except csv.Error as error:
        raise UserError(f"is no row of CSV ({error})", field=where) from None


def _rest(line: bytes, lines: Iterator[bytes]) -> int:
    """Takes the further lines that a row reaches over; returns their bytes."""
    taken = 0

    def texts() -> Iterator[str]:
        nonlocal taken
        yield _text(line)
        for further in lines:
            taken += len(further)
            yield _text(further)

    with contextlib.suppress(csv.Error):  # behind such a line the csv module begins a row anew
        next(csv.reader(texts()))
    return taken


def _text(line: bytes) -> str:
    return line.removeprefix(MARK).decode("utf-8", "surrogateescape")


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines with their ends, which may be those of old Macs, as Python opens text by default."""
    while line := file.readline(MOST):
        if b"\r" in line.removesuffix(b"\n").removesuffix(b"\r"):
            yield from (part for part in LINE.findall(line) if part)
        else:
            yield line
