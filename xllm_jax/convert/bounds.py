"""What a checkpoint may ask for: files, headers and shapes of a size that can be meant."""

from __future__ import annotations

import math
import os
import reprlib
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from xllm_jax.core import bounded
from xllm_jax.core.errors import UserError

MOST_PACKED = 1 << 24  # bytes that an entry of a small archive may unpack to
LONGEST = 1000  # letters of a tensor's name
MOST_DIMS = 64  # of an array, as of NumPy's
SHOWN = 80  # letters of a stranger's text in a message


def read_json(file: Path) -> Any:
    """A JSON file's value.

    Raises:
      UserError: no regular file, too large, or no JSON.
    """
    if not os.path.isfile(file):
        raise UserError("no such file", field=str(file), hint="Download it again")
    try:
        return bounded.read_json(file)
    except (ValueError, RecursionError, OSError) as error:
        raise UserError("is not JSON", field=str(file), hint="Download it again") from error


def shape(value: object, dtype: DTypeLike, where: str) -> tuple[int, ...]:
    """The shape that a file states for an array.

    Args:
      value: a list or tuple.
      dtype: of the array.
      where: place of the array, for messages.

    Raises:
      UserError: it is none that an array can have.
    """
    numbers = isinstance(value, list | tuple) and len(value) <= MOST_DIMS
    numbers = numbers and all(type(n) is int and 0 <= n < 1 << 63 for n in value)
    known = tuple(value) if numbers else ()
    if not numbers or math.prod(max(n, 1) for n in known) * np.dtype(dtype).itemsize > 1 << 62:
        # A pickle's tuple that holds itself in many places has a text without end.
        what = f"has the shape {reprlib.repr(value)[:SHOWN]}"
        raise UserError(what, field=where, hint="Download it again")
    return known


def check_name(name: str, path: Path) -> None:
    """Raises UserError for a name that no tensor has."""
    if len(name) > LONGEST:
        what = f"has a tensor whose name has {len(name):,} letters: {name[:SHOWN]}…"
        raise UserError(what, field=str(path), hint="Download it again")


def check_archive(archive: zipfile.ZipFile, path: Path) -> None:
    """Looks at the entries of a zip, which PyTorch stores as they are.

    Raises:
      UserError: one would unpack to more than the whole archive has.
    """
    most = max(path.stat().st_size, MOST_PACKED)
    for entry in archive.infolist():
        if entry.file_size > most:
            what = f"{entry.filename[:SHOWN]} would unpack to {entry.file_size:,} bytes"
            raise UserError(what, field=str(path), hint="Download it again")
