"""Places of the members of a tar, read once and kept beside it, and believed only while they fit.

    .index/NAME.npy     `[1 + samples, COLUMNS]` int64; the first row is bound to the tar: its size,
                        its time, a hash of bytes spread over it, and one of the other rows

An index may have come along with a stranger's tars. So the headers of some members, others each
time, are looked at as well; where anything does not fit, the tar is read anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from xllm_jax.core import atomic
from xllm_jax.core.errors import UserError
from xllm_jax.data.media import reach
from xllm_jax.data.rows import files

COLUMNS = 5  # image offset and length, caption offset and length, whether the caption is JSON
BLOCKS, BLOCK = 64, 512  # of the tar that are hashed
LOOKED_AT = 64  # samples whose headers are compared


def kept(tar: Path, scan: Callable[[Path], np.ndarray]) -> np.ndarray:
    """Places of the samples of a tar: `[samples, COLUMNS]` int64.

    Args:
      tar: the file.
      scan: reads them from the tar itself.

    Raises:
      UserError: the tar is damaged, or it or the index lies out of reach.
    """
    reach.check_opened(tar)
    file = tar.parent / ".index" / f"{tar.stem}.npy"
    reach.check_opened(file)
    with contextlib.suppress(UserError):  # without it, or where it is damaged, a new one is made
        found = files.array(file, "index of a tar")
        if found.ndim == 2 and found.dtype == np.int64 and found.shape[1] == COLUMNS:
            rows = found[1:]
            if found[:1].tolist() == [_stamp(tar, rows)] and _fits(tar, rows):
                return rows
    rows = scan(tar)
    if not file.parent.is_symlink():  # nothing is written where a stranger's link leads
        with contextlib.suppress(OSError, UserError):  # else it is scanned again the next time
            atomic.write_array(file, np.concatenate([[_stamp(tar, rows)], rows]))
    return rows


def _stamp(tar: Path, rows: np.ndarray) -> list[int]:
    """What an index is bound to."""
    state, content = tar.stat(), hashlib.sha256()
    with tar.open("rb") as file:
        for at in np.linspace(0, max(state.st_size - BLOCK, 0), BLOCKS).astype(np.int64).tolist():
            file.seek(at)
            content.update(file.read(BLOCK))
    hashes = content.digest(), hashlib.sha256(np.ascontiguousarray(rows, "<i8").tobytes()).digest()
    numbers = (int.from_bytes(one[:8], "little", signed=True) for one in hashes)
    return [state.st_size, state.st_mtime_ns, *numbers, len(rows)]


def _fits(tar: Path, rows: np.ndarray) -> bool:
    """Whether all places lie within a tar, and some hold what an index says."""
    starts, sizes = rows[:, (0, 2)], rows[:, (1, 3)]
    size = tar.stat().st_size
    if (starts < BLOCK).any() or (sizes < 0).any() or (sizes > size - starts).any():
        return False
    drawn = np.random.default_rng().permutation(len(rows))[:LOOKED_AT]
    with tar.open("rb") as file:
        return all(_sample_fits(file, *rows[n].tolist()) for n in drawn)


def _sample_fits(
    file: BinaryIO, image: int, length: int, text: int, size: int, is_json: int
) -> bool:
    """Whether an image and a caption of these places and lengths belong to one sample."""
    names = []
    for start, wanted in ((image, length), (text, size)):
        file.seek(start - BLOCK)
        try:
            member = tarfile.TarInfo.frombuf(file.read(BLOCK), "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            return False
        if not member.isfile() or member.size != wanted:
            return False
        names.append(member.name)
    stems = {os.path.basename(name).partition(".")[0] for name in names}
    whole = all(len(name) < tarfile.LENGTH_NAME for name in names)
    return not whole or (len(stems) == 1 and names[1].lower().endswith(".json") == bool(is_json))
