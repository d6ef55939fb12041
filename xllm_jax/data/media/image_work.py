"""What reading an image file takes besides its pixels, told by its parts before Pillow sees it.

A decoder goes over every scan of a JPEG, each as large as the picture. Pillow reads chunks and
markers one by one, joins comments in quadratic time, copies whatever a directory of tags points at,
and decodes run-length coded BMP in Python. A TIFF of one pixel may have a tile of 900 MB.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from xllm_jax.core.errors import UserError

MOST_PARTS = 100_000  # chunks, markers, blocks, strips, tiles
MOST_SCANS = 100  # of a JPEG; ten are usual
MOST_BESIDE = 1 << 20  # bytes of a GIF before its first picture
MOST_RUNS = 1 << 23  # bytes and pixels of a run-length coded BMP
TILE = 1 << 22, 1 << 26  # pixels of a TIFF's tile: of any picture, and of the largest

PROGRESSIVE = (0xC2, 0xC6, 0xCA, 0xCE)  # frames whose bits come in several scans
MARKER = re.compile(rb"\xff+([\x01-\xcf\xd8-\xfe])", re.DOTALL)  # neither data nor restarts
SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
SIZES |= {16: 8, 17: 8, 18: 8}  # bytes of a value of each of TIFF's types
WIDTH, HEIGHT, STRIPS, TILE_WIDTH, TILE_HEIGHT, TILES = 256, 257, 273, 322, 323, 324
PARTS = f"has more than {MOST_PARTS:,} parts"


class Tag(NamedTuple):
    """An entry of a TIFF directory: number, values, bytes copied, and its value or their place."""

    number: int
    count: int
    size: int
    value: int


def check(path: str | Path, content: bytes) -> None:
    """Looks at an image's parts.

    Args:
      path: of the image, for the message.
      content: all of it.

    Raises:
      UserError: reading it would take longer, or more memory, than its pixels account for.
    """
    what = next((look(content) for begin, look in LOOKS.items() if content.startswith(begin)), "")
    if what:
        raise UserError(what, field=str(path), hint="Save it again")


def crowded(directory: bytes) -> bool:
    """Whether the tags of EXIF claim more bytes than there are; each is copied by itself.

    Args:
      directory: EXIF, with or without its name in front.
    """
    return bool(_tiff(directory.removeprefix(b"Exif\0\0")))


def buffered(content: bytes) -> bool:
    """Whether libjpeg keeps all coefficients of a file: its channels or bits come in parts."""
    channels = 0
    for kind, at in _markers(content) if content.startswith(b"\xff\xd8\xff") else ():
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):
            channels = content[at + 7] if at + 7 < len(content) else 0
            if kind in PROGRESSIVE:
                return True
        if kind == 0xDA:
            return at + 2 < len(content) and content[at + 2] < channels
    return False


def _jpeg(content: bytes) -> str:
    """Why a JPEG takes too much, or ''."""
    scans, directories = 0, {b"Exif\0\0": b"", b"MPF\0": b""}
    for number, (kind, at) in enumerate(_markers(content)):
        if number == MOST_PARTS:
            return PARTS
        if kind == 0xDA:
            scans += 1
        if scans > MOST_SCANS:
            return f"has more than {MOST_SCANS} scans"
        size = int.from_bytes(content[at : at + 2])
        for name in directories:  # Pillow joins those of a name
            if not scans and content.startswith(name, at + 2):
                directories[name] += content[at + 2 + len(name) : at + size]
    if any(map(crowded, directories.values())):
        return "has EXIF tags that claim more bytes than it has"
    return ""


def _markers(content: bytes) -> Iterator[tuple[int, int]]:
    """(kind, place behind it) of each marker up to the end of the picture."""
    at = 2
    while found := MARKER.search(content, at):
        kind, at = found[1][0], found.end()
        if len(found[0]) > MOST_PARTS:  # Pillow reads fill bytes one by one
            yield from ((kind, at) for _ in range(MOST_PARTS + 1))
        if kind == 0xD9:
            return
        yield kind, at
        if kind not in (0x01, 0xD8):
            at += max(int.from_bytes(content[at : at + 2]), 2)


def _png(content: bytes) -> str:
    at = 8
    for _ in range(MOST_PARTS):
        if len(content) < at + 8 or content.startswith(b"IEND", at + 4):
            return ""
        at += 12 + int.from_bytes(content[at : at + 4])
    return PARTS


def _gif(content: bytes) -> str:
    """Looks at what Pillow reads before the first picture."""
    if len(content) < 13:
        return ""
    start = at = 13 + (3 << (content[10] & 7) + 1 if content[10] & 0x80 else 0)
    while at < len(content) and not content.startswith((b",", b";"), at):
        if content.startswith(b"!", at):
            at += 2
            while at < min(len(content), start + MOST_BESIDE) and content[at]:
                at += 1 + content[at]
        at += 1
        if at - start > MOST_BESIDE:
            return f"has more than {MOST_BESIDE:,} bytes before its first picture"
    return ""


def _bmp(content: bytes) -> str:
    if len(content) < 34:
        return ""
    head, width, height = struct.unpack_from("<Iii", content, 14)
    packed = head >= 40 and int.from_bytes(content[30:34], "little") in (1, 2)
    if packed and max(len(content), abs(width * height)) > MOST_RUNS:
        return f"is run-length coded, with more than {MOST_RUNS:,} bytes or pixels"
    return ""


def _tiff(content: bytes) -> str:
    try:
        tags = _tags(content)
    except struct.error:  # cut off, which Pillow tells
        return ""
    if sum(tag.size for tag in tags) > len(content):
        return "has tags that claim more bytes than it has"
    if any(tag.count > MOST_PARTS for tag in tags if tag.number in (STRIPS, TILES)):
        return PARTS
    said: dict[int, int] = {}
    for tag in tags:  # a reader takes the first of a number, another the last
        said[tag.number] = max(tag.value, said.get(tag.number, 0))
    pixels = said.get(WIDTH, 0) * said.get(HEIGHT, 0)
    tile = said.get(TILE_WIDTH, 0) * said.get(TILE_HEIGHT, 0)
    least, most = TILE
    if tile > min(max(2 * pixels, least), most):
        return f"has tiles of {tile:,} pixels"
    return ""


def _tags(content: bytes) -> list[Tag]:
    """The first directory of a TIFF.

    Raises:
      struct.error: it is cut off.
    """
    order, big = "<" if content[:2] == b"II" else ">", content[2:3] == b"+"  # as Pillow has it
    start = struct.unpack_from(f"{order}Q", content, 8) if big else ()
    at = (start or struct.unpack_from(f"{order}I", content, 4))[0]
    (count,) = struct.unpack_from(order + ("Q" if big else "H"), content, min(at, len(content)))
    entry = struct.Struct(order + ("HHQ8s" if big else "HHI4s"))
    at += 8 if big else 2
    if count * entry.size > len(content):
        raise struct.error("cut off")
    found = []
    for place in range(at, at + count * entry.size, entry.size):
        number, kind, values, beside = entry.unpack_from(content, place)
        size, inside = values * SIZES.get(kind, 0), len(beside)
        width = min(SIZES.get(kind, 0), inside) if values == 1 else inside
        value = int.from_bytes(beside[:width], "little" if order == "<" else "big")
        copied = (
            size if inside < size <= len(content) - value else 0
        )  # Pillow skips what is cut off
        found.append(Tag(number, values, copied, value))
    return found


LOOKS: dict[bytes, Callable[[bytes], str]] = {
    b"\xff\xd8\xff": _jpeg,
    b"\x89PNG": _png,
    b"GIF8": _gif,
    b"BM": _bmp,
    b"II": _tiff,
    b"MM": _tiff,
}
