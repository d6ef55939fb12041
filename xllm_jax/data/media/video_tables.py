"""How many frames and packets an MP4 or MOV counts, told before FFmpeg makes a list of them all.

Sizes and durations that are all the same stand in the file once, so that a kilobyte can count a
hundred million samples, each of which takes FFmpeg 35 bytes.
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Iterator
from pathlib import Path

from xllm_jax.core.errors import UserError
from xllm_jax.data.media import metadata_names, paths

MOST_SAMPLES = 1 << 22  # of all tracks: 19 hours of 60 frames a second
MOST_BOXES = 100_000
HOLDING = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"moof", b"traf", b"mvex")
NAMING = (b"udta", b"ilst")  # whose boxes FFmpeg makes names of
MOST_META = 1 << 25  # bytes
# Where a table's count stands behind the head of its box.
COUNTS = {b"stsz": 8, b"stz2": 8, b"stts": 4, b"ctts": 4, b"stsc": 4, b"stco": 4, b"co64": 4}
COUNTS |= {b"stss": 4, b"elst": 4, b"trun": 4, b"sbgp": 8, b"saiz": 5}
FIRSTS = (b"ftyp", b"styp", b"moov", b"moof", b"mdat", b"sidx", b"free", b"skip", b"wide", b"uuid")


def check(path: str | Path, head: bytes) -> None:
    """Looks at the tables of a file.

    Args:
      path: of a clip.
      head: its first bytes.

    Raises:
      UserError: more samples than MOST_SAMPLES, or more boxes than MOST_BOXES, a
        packed header, or more names than metadata should have.
    """
    if head[4:8] not in (*FIRSTS, b"pnot"):
        return
    source = paths.source(path, "video", spans=True)
    with open(source, "rb") if isinstance(source, str) else source as file:
        total: dict[bytes, int] = {}
        names = 0
        for number, (name, at, holder) in enumerate(_boxes(file, 0, file.seek(0, os.SEEK_END))):
            if number == MOST_BOXES:
                raise UserError(f"has more than {MOST_BOXES:,} boxes", field=str(path))
            if name == b"cmov":
                what = "has a packed header, whose tables cannot be counted"
                raise UserError(what, field=str(path), hint="Remux it")
            names += holder in NAMING
            if names > metadata_names.MOST_NAMES:
                raise metadata_names.too_many(path)
            if name in COUNTS:
                total[name] = total.get(name, 0) + _number(file, at + COUNTS[name])
            if total.get(name, 0) > MOST_SAMPLES:
                what = f"counts {total[name]:,} samples, more than {MOST_SAMPLES:,}"
                raise UserError(what, field=str(path), hint="Cut it into clips")


def _boxes(file: io.BufferedIOBase, start: int, end: int) -> Iterator[tuple[bytes, int, bytes]]:
    """(name, place behind its head, name of its holder) of every box, those within HOLDING ones,
    NAMING ones and metadata included."""
    ends, holders = [end], [b""]
    at = start
    while ends:
        if at + 8 > ends[-1]:
            at = ends.pop()
            holders.pop()
            continue
        file.seek(at)
        size, name = struct.unpack(">I4s", file.read(8))
        inside = at + 8
        if size == 1:
            size, inside = int.from_bytes(file.read(8)), at + 16
        behind = min(at + size if size else ends[-1], ends[-1])
        yield name, inside, holders[-1]
        if name == b"meta":
            inside = _behind_version(file, inside, behind)
        if name in (*HOLDING, *NAMING, b"meta") and behind > inside:
            ends.append(behind)
            holders.append(name)
            at = inside
        else:
            at = max(behind, inside)


def _behind_version(file: io.BufferedIOBase, start: int, end: int) -> int:
    """Where the boxes of metadata begin: at their handler, as FFmpeg finds it; `end` of none."""
    file.seek(start)
    content = file.read(min(end - start, MOST_META))
    at = content.find(b"hdlr")
    while at % 4 and at >= 0:
        at = content.find(b"hdlr", at + 1)
    return start + at - 4 if at >= 4 else end


def _number(file: io.BufferedIOBase, at: int) -> int:
    file.seek(at)
    return int.from_bytes(file.read(4))
