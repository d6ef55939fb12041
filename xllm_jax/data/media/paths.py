"""Media paths: a file, a part of an archive, a span of time, or bytes that came with a row.

    clips/v1.mp4                     a file
    cc3m/00012.tar::1536:20480       20480 bytes of a file, from byte 1536 on
    clips/v1.mp4#t=12.5,30           seconds 12.5 to 30 of a video (W3C media fragments)

Every decoder opens its path by `source`, so that a new place for media is added here alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import re

from xllm_jax.core.errors import UserError

PATH = re.compile(
    r"(?P<file>.+?)(?:::(?P<offset>\d{1,18}):(?P<length>\d{1,18}))?"
    r"(?:#t=(?P<start>\d+(?:\.\d+)?),(?P<end>\d+(?:\.\d+)?))?",
    re.DOTALL,
)


MOST_BYTES = 1 << 30  # of a medium that is read into memory


@dataclasses.dataclass(frozen=True)
class Place:
    """What a media path says.

    Attributes:
      file: the file itself.
      part: (offset, length) in bytes, None for the whole file.
      span: (start, end) in seconds, None for all of it.
    """

    file: str
    part: tuple[int, int] | None = None
    span: tuple[float, float] | None = None


class Carried(str):
    """The name of a medium whose bytes its row brought along, as in Arrow and ArrayRecord.

    Messages and lists name it like any other path, and `source` opens its `content`.
    """

    content: bytes

    def __new__(cls, name: str, content: bytes) -> Carried:
        made = super().__new__(cls, name)
        made.content = content
        return made

    def __reduce__(self):
        return Carried, (str(self), self.content)


def part(file: str | os.PathLike, offset: int, length: int) -> str:
    """The path of some bytes of a file."""
    return f"{file}::{offset}:{length}"


def span(path: str, start: float, end: float) -> str:
    """The path of a span of a video, in seconds."""
    return f"{path}#t={start:.3f},{end:.3f}"


def place(path: str | os.PathLike) -> Place:
    """Takes a media path apart."""
    found = PATH.fullmatch(str(path))
    if not found:
        return Place(str(path))
    bytes_, seconds = (found["offset"], found["length"]), (found["start"], found["end"])
    return Place(
        found["file"],
        (int(bytes_[0]), int(bytes_[1])) if bytes_[0] else None,
        (float(seconds[0]), float(seconds[1])) if seconds[0] else None,
    )


def source(path: str | os.PathLike, kind: str = "", spans: bool = False) -> str | io.BytesIO:
    """What a decoder opens: the name of a whole file, or the bytes of a part.

    Args:
      path: in one of the forms above, or Carried.
      kind: 'image', 'video' … for the message.
      spans: the decoder knows how to cut spans of time.

    Raises:
      UserError: no such file, a part beyond its end, or a span for a decoder that cuts none.
    """
    if isinstance(path, Carried):
        return io.BytesIO(path.content)
    found = place(path)
    if found.span and not spans:
        raise UserError("only videos have spans of time", field=str(path))
    if not os.path.isfile(found.file):
        what = f"no such {kind} file" if kind else "no such file"
        if os.path.isdir(found.file):
            what += ": a folder cannot be read"
        raise UserError(what, field=str(path), hint="Check the path and data.root")
    return io.BytesIO(read(path)) if found.part else found.file


def whole(path: str | os.PathLike, kind: str = "", most: int = MOST_BYTES) -> io.BytesIO:
    """A medium in memory, by one read where a decoder would ask for many small ones.

    Args:
      path: of the medium.
      kind: 'image', 'video' … for the message.
      most: bytes that it may have.

    Raises:
      UserError: as `source`, without spans, or it is larger.
    """
    found = source(path, kind)
    return found if isinstance(found, io.BytesIO) else io.BytesIO(read(path, most=most))


def sha256(path: str | os.PathLike, kind: str = "") -> str:
    """Hash of what a medium holds (hex, 64 digits), and of its span of time where it has one.

    Args:
      path: of the medium.
      kind: 'image', 'video' … for the message.

    Raises:
      UserError: as `source`, or the file cannot be read.
    """
    span = "" if isinstance(path, Carried) else str(place(path).span or "")
    found = source(path, kind, spans=True)
    try:
        with found if isinstance(found, io.BytesIO) else open(found, "rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.sha256(span.encode())).hexdigest()
    except ValueError as error:  # a name that no file system knows
        raise UserError("no such file", field=str(path)) from error
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", field=str(path)) from error


def read(path: str | os.PathLike, first: int | None = None, most: int = MOST_BYTES) -> bytes:
    """The bytes of a medium, as they lie on disk.

    Args:
      path: of the medium.
      first: how many of them, if it has so many; None is all.
      most: bytes that are read at most.

    Raises:
      UserError: no such file, a part beyond its end, or more bytes than `most`.
    """
    if isinstance(path, Carried):
        return path.content[:first]
    found = place(path)
    try:
        with open(found.file, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            offset, length = found.part or (0, size)
            if offset + length > size:
                what = f"ends {offset + length - size} bytes before this part does"
                raise UserError(what, field=str(path), hint="Download the archive again")
            length = length if first is None else min(first, length)
            if length > most:
                what = f"has {length:,} bytes, more than {most:,}"
                raise UserError(what, field=str(path), hint="Shrink it")
            file.seek(offset)
            return file.read(length)
    except ValueError as error:  # a name that no file system knows
        raise UserError("no such file", field=str(path)) from error
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", field=str(path)) from error
