"""How many names the metadata of an AVI, FLV or ASF (WMV) has, told before FFmpeg lists them.

FFmpeg looks through the whole list for each name. What MP4 and Matroska hold is counted where
their boxes and elements are walked.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from xllm_jax.core.errors import UserError
from xllm_jax.data.media import paths, unsized

MOST_NAMES = 500  # of a file
MOST_PARTS = 10_000  # chunks, tags or objects that are looked at
# A script of FLV lists its key frames, too, 18 bytes each; a name takes 7 bytes and more.
SCRIPT_BYTES, SCRIPT_TAG, FLV_TAGS = 1 << 17, 18, 1_000_000  # four hours
ASF = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
ASF_DATA = bytes.fromhex("3626b2758e66cf11a6d900aa0062ce6c")
ASF_EXTENSION = bytes.fromhex("b503bf5f2ea9cf118ee300c00c205365")
ASF_NAMES = (
    bytes.fromhex("40a4d0d207e3d21197f000a0c95ea850"),  # extended content description
    bytes.fromhex("eacbf8c5af5b77488467aa8c44fa4cca"),  # metadata
    bytes.fromhex("941c23449894d149a1411d134e457054"),  # metadata library
)


def check(path: str | Path, head: bytes) -> None:
    """Counts the names of a file.

    Args:
      path: of a clip.
      head: its first bytes.

    Raises:
      UserError: more than MOST_NAMES, scripts beyond SCRIPT_BYTES, MOST_PARTS parts before the
        frames, or more than FLV_TAGS tags.
    """
    if head[:4] == b"RIFF":
        counted, most = _avi, MOST_NAMES
    elif head[:3] == b"FLV":
        counted, most = _flv, SCRIPT_BYTES
    elif head.startswith(ASF):
        counted, most = _asf, MOST_NAMES
    else:
        return
    source = paths.source(path, "video", spans=True)
    with open(source, "rb") if isinstance(source, str) else source as file:
        for number, total in enumerate(itertools.accumulate(counted(file))):
            if total > most or number == MOST_PARTS:
                raise too_many(path)


def too_many(path: str | Path) -> UserError:
    """The refusal of a clip with too much metadata."""
    what = f"has more metadata than {MOST_NAMES:,} names"
    return UserError(what, field=str(path), hint="Remux it without them")


def _avi(file: BinaryIO) -> Iterator[int]:
    """Names of each chunk before the frames; lists are flat to FFmpeg, but for those of names."""
    at = 12
    while len(head := _read(file, at, 12)) == 12:
        name, size, kind = struct.unpack("<4sI4s", head)
        behind = at + 8 + size + size % 2
        named = name == b"LIST" and kind == b"INFO"
        if name == b"LIST" and kind == b"movi":
            return
        chunks = unsized.chunks(file, "<", at + 12) if named else iter(())
        inside = itertools.islice(chunks, MOST_NAMES + 1)
        yield sum(start <= behind for _, start, _ in inside)
        at = at + 12 if name == b"LIST" and not named else behind


def _flv(file: BinaryIO) -> Iterator[int]:
    """Bytes of each script: FFmpeg reads those between the frames, too."""
    at = int.from_bytes(_read(file, 5, 4)) + 4
    for _ in range(FLV_TAGS):
        head = _read(file, at, 4)
        if len(head) < 4:
            return
        size = int.from_bytes(head[1:])
        if head[0] & 31 == SCRIPT_TAG:
            yield size
        at += 11 + size + 4
    yield SCRIPT_BYTES + 1


def _asf(file: BinaryIO) -> Iterator[int]:
    """Names that each object before the frames counts."""
    at = 30
    while len(head := _read(file, at, 26)) == 26:
        kind, size, count = struct.unpack("<16sQH", head)
        if kind == ASF_DATA or size < 24:
            return
        yield count if kind in ASF_NAMES else 0
        at += 46 if kind == ASF_EXTENSION else min(size, 1 << 40)


def _read(file: BinaryIO, at: int, size: int) -> bytes:
    file.seek(at)
    return file.read(size)
