"""Small files whose size nobody has vouched for: configurations, states, vocabularies."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from xllm_jax.core.errors import UserError

MOST = 100_000_000  # bytes of a header, an index, a configuration or a state
MOST_SIGNS = 1 << 22  # that make values of JSON: 100 MB of "{}," would take 3 GB of memory
SIGNS = "{[,:"


def read_bytes(file: Path, most: int = MOST) -> bytes:
    """The content of a regular file.

    Args:
      file: to be read.
      most: bytes that it may have.

    Raises:
      OSError: it is not there, or cannot be read.
      UserError: it is larger, or a pipe or a device, for which nobody waits.
    """

    def at_once(path: str, flags: int) -> int:
        return os.open(path, flags | os.O_NONBLOCK)

    with open(file, "rb", opener=at_once) as opened:
        state = os.fstat(opened.fileno())
        _check(file, state, most)
        content = opened.read(most + 1)
        if len(content) > most:
            what = f"has more than {most:,} bytes"
            raise UserError(what, field=str(file), hint="Bring it back from a copy, or fetch it")
    return content


def look(file: Path, most: int = MOST) -> None:
    """Looks at a file that a library will read as a whole; one that is not there is none.

    Raises:
      UserError: as of `read_bytes`.
    """
    try:
        state = os.stat(file)
    except OSError:
        return
    _check(file, state, most)


def _check(file: Path, state: os.stat_result, most: int) -> None:
    if not stat.S_ISREG(state.st_mode):
        raise UserError("is no regular file", field=str(file))
    if state.st_size > most:
        what = f"has {state.st_size:,} bytes, more than {most:,}"
        raise UserError(what, field=str(file), hint="Bring it back from a copy, or fetch it")


def read_text(file: Path) -> str:
    """The same as UTF-8.

    Raises:
      OSError, UserError: as of `read_bytes`.
      ValueError: it is no UTF-8.
    """
    return read_bytes(file).decode("utf-8")


def read_json(file: Path) -> Any:
    """The value of a JSON file.

    Raises:
      OSError, UserError: as of `read_bytes`.
      ValueError, RecursionError: as of `parsed`.
    """
    return parsed(read_bytes(file))


def parsed(content: bytes) -> Any:
    """The value of a JSON text.

    Raises:
      ValueError: no JSON, or of so many values that they would take more memory than any header,
        index, configuration or state does.
    """
    if sum(map(content.count, SIGNS.encode())) > MOST_SIGNS:
        raise ValueError("too many values")
    return json.loads(content)
