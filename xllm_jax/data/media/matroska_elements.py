"""What a Matroska or WebM holds beside its frames, told before FFmpeg makes lists of it.

An empty entry of two bytes takes FFmpeg up to a hundred, and the time for tags grows with the cube
of their number.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path

from xllm_jax.core.errors import UserError
from xllm_jax.data.media import paths

EBML = b"\x1a\x45\xdf\xa3"
SEGMENT, CLUSTER, SEEK_HEAD = 0x18538067, 0x1F43B675, 0x114D9B74
SEEK, SEEK_POSITION = 0x4DBB, 0x53AC
# {identity: (name, most bytes and most entries of all such elements together)}
BOUNDS = {
    SEEK_HEAD: ("places", 1 << 14, 500),
    0x1254C367: ("tags", 1 << 18, 500),
    0x1043A770: ("chapters", 1 << 18, 1000),
    0x1654AE6B: ("tracks", 1 << 20, 64),  # the head of each may unpack to 10 MB
    0x1C53BB6B: ("cues", 1 << 22, 200_000),
    0x1941A469: ("attachments", 1 << 25, 1000),
}
MOST_ELEMENTS = 1_000_000

Element = tuple[int, int, int]
"""(identity, place behind the head, place behind the element)."""


def check(path: str | Path, head: bytes) -> None:
    """Looks at what a file holds beside its clusters, and at what its list of places names.

    Args:
      path: of a clip.
      head: its first bytes.

    Raises:
      UserError: more tags, cues, attachments … than BOUNDS, or more than MOST_ELEMENTS.
    """
    if not head.startswith(EBML):
        return
    source = paths.source(path, "video", spans=True)
    with open(source, "rb") if isinstance(source, str) else source as file:
        end = file.seek(0, os.SEEK_END)
        total, entries = dict.fromkeys(BOUNDS, 0), dict.fromkeys(BOUNDS, 0)
        for kind, at, behind in _met(file, end, str(path)):
            name, most, many = BOUNDS[kind]
            total[kind] += behind - at
            entries[kind] += sum(1 for _ in zip(range(many + 1), _elements(file, at, behind)))
            if total[kind] > most or entries[kind] > many:
                what = f"has more than {many:,} {name}, or {most:,} bytes of them"
                raise UserError(what, field=str(path), hint="Remux it without them")


def _met(file: io.BufferedIOBase, end: int, field: str) -> Iterator[Element]:
    """The elements that BOUNDS has, each once: those on the way and those that places name."""
    seen, count, origin = set(), 0, 0
    starts = [0]
    while starts:
        for kind, at, behind in _elements(file, starts.pop(), end):
            count += 1
            if count > MOST_ELEMENTS:
                raise UserError(f"has more than {MOST_ELEMENTS:,} elements", field=field)
            if at in seen:
                break
            seen.add(at)
            if kind == SEGMENT:
                origin = at
            if kind == SEEK_HEAD:
                starts += [origin + place for place in _places(file, at, behind)]
            if kind in BOUNDS:
                yield kind, at, behind


def _places(file: io.BufferedIOBase, at: int, end: int) -> list[int]:
    """Where a list of places says that elements are, counted from the segment's content."""
    found = []
    for kind, inside, behind in _elements(file, at, min(end, at + BOUNDS[SEEK_HEAD][1])):
        if kind == SEEK:
            for part, start, stop in _elements(file, inside, min(behind, inside + 64)):
                if part == SEEK_POSITION and stop - start <= 8:
                    file.seek(start)
                    found.append(int.from_bytes(file.read(stop - start)))
    return found


def _elements(file: io.BufferedIOBase, at: int, end: int) -> Iterator[Element]:
    """Elements one behind the other; those of a segment, or of one whose size is unknown, follow
    it. Ends at what is none."""
    while at < end:
        file.seek(at)
        head = file.read(12)
        kind, length = _number(head, 4, keep=True)
        size, more = _number(head[length:], 8)
        if not length or not more:
            return
        inside = at + length + more
        endless = size == (1 << 7 * more) - 1
        behind = max(inside, end if endless else min(inside + size, end))
        yield kind, inside, behind
        at = inside if kind == SEGMENT or endless else behind


def _number(head: bytes, most: int, keep: bool = False) -> tuple[int, int]:
    """(value, its bytes) of a number of variable length; (0, 0) of none."""
    length = 9 - head[0].bit_length() if head and head[0] else 0
    if not length or length > most or length > len(head):
        return 0, 0
    value = int.from_bytes(head[:length])
    return value if keep else value & (1 << 7 * length) - 1, length
