"""Opening annotation files within reach, and what to say about one that is not there."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np

from xllm_jax.core.errors import UserError
from xllm_jax.data.media import reach

MEND = "Check data.root and the source's path, or see the reader's docstring"
SHOWN = 8  # names of a folder that a message shows
MOST = 1 << 26  # bytes of a row: more is no row, and is not read into memory


def opened(path: str | os.PathLike) -> BinaryIO:
    """An annotation file, opened for reading bytes.

    Raises:
      UserError: no such file, one that cannot be read, or out of reach of the source that is read.
    """
    reach.check_opened(path)
    if not os.path.isfile(path):  # False, too, for names that no file system knows
        raise missing(path)
    try:
        return open(path, "rb")
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", field=str(path)) from None


def part(file: BinaryIO, start: int, end: int, where: str) -> str:
    """The text of some bytes of a file.

    Args:
      file: opened.
      start, end: the first byte, and the one behind the last.
      where: place for messages.

    Raises:
      UserError: not UTF-8, more than MOST bytes, or the file has changed and ends before.
    """
    if end - start > MOST:
        raise UserError(f"has {end - start:,} bytes, and a row at most {MOST:,}", field=where)
    try:
        file.seek(start)
        content = file.read(end - start)
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", field=where) from None
    if len(content) < end - start:
        raise UserError("its file has become shorter", field=where, hint="Start again")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"is not UTF-8 text ({error.reason})", field=where) from None


def array(path: str | os.PathLike, what: str, mapped: bool = False) -> np.ndarray:
    """A `.npy` file.

    Args:
      path: the file.
      what: it is to be, for messages.
      mapped: leave it on the disk until it is used.

    Raises:
      UserError: no such file, out of reach, or it is damaged or no array.
    """
    reach.check_opened(path)
    if not os.path.isfile(path):
        raise missing(path)
    try:
        found = np.lib.format.open_memmap(path, mode="r")  # it compares sizes before it reads
    except Exception as error:  # what NumPy raises on damaged files has no bounds
        raise UserError(f"is no {what} ({' '.join(str(error).split())})", field=str(path)) from None
    return found if mapped else np.array(found)


def missing(path: str | os.PathLike, also: Sequence[str] = ()) -> UserError:
    """What to raise where a file is not there; names what its folder holds instead.

    Args:
      path: of the file.
      also: other names that would have done.
    """
    parents = [folder for folder in pathlib.Path(path).parents[:3] if os.path.isdir(folder)]
    found = names(parents[0]) if parents else ""
    parts = [f"Looked also for {', '.join(also)}" if also else MEND]
    parts += [f"Found in {parents[0]}: {found}"] if found else []
    return UserError("no such file", field=str(path), hint=". ".join(parts))


def names(folder: str | os.PathLike) -> str:
    """The names in a folder, a few of them; '' where there is none."""
    try:
        found = sorted(os.listdir(folder))
    except (OSError, ValueError):
        return ""
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return ", ".join(map(_shown, found[:SHOWN])) + more


def _shown(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode("utf-8")
