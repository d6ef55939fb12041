"""Recordings that were streamed: their header was written before anybody knew how long they are.

WAV, RF64, AU and CAF then state 0 or the largest number, FLAC states 0 samples. libsndfile reads
nothing of such a file, or refuses it; here it gets the size that the file really has. MP3 without
a header of its own is as long as libsndfile guesses by its first frame; here it is read again.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import numpy as np

MOST_BYTES = 1 << 29  # of a file that is mended, in memory
MOST_CHUNKS = 10_000  # looked at, be they empty
BEYOND = 1 << 40  # bytes: the end of every file; there is no place that is much further
MP3_TAG = 64  # bytes of the first frame that hold the tag with the length
MP3_PADDING = 4 * 1152  # samples that an encoder may add at both ends
HEAD = 12  # bytes before the first chunk of a WAV file
FLAC_FIRST = 42  # bytes of FLAC's mark and its first block, the only one that is needed
MOST_TAG = 1 << 17  # bytes before an MP3 that libsndfile gets
ID3_END, APE_END = 128, 32  # bytes of tags, or of their ends, behind an MP3
FLAC_TOTAL = 21  # place of FLAC's count, whose 36 bits begin in the middle of this byte


class Size(NamedTuple):
    """Where a header states the size of the samples.

    Attributes:
      at: place of the number.
      form: of the number, as `struct` has it.
      value: what it says.
      start: place of the first sample.
      order: of the bytes in the chunks behind, '' where no chunks can follow.
    """

    at: int
    form: str
    value: int
    start: int
    order: str = ""


def mended(file: BinaryIO) -> bytes | None:
    """The content of a recording with its true size in the header; None where nothing is wrong.

    What stands before an MP3 is left out where it is large.

    Args:
      file: any file, read from its start.
    """
    if file.seek(0, io.SEEK_END) > MOST_BYTES:
        return None
    if _read(file, 0, 4) == b"fLaC":
        return _flac(file)
    head = _read(file, 0, 10)
    if head[:3] == b"ID3" and _sevens(head[6:]) > MOST_TAG:
        return _unnamed(_read(file, 0))
    found = _stated(file)
    if found is None or not (found.value == 0 or found.value == -1):
        return None
    content = _read(file, 0)
    rest = len(content) - found.start
    if rest <= 0 or (found.order and _are_chunks(content, found.start, found.order)):
        return None
    made = bytearray(content)
    struct.pack_into(found.form, made, found.at, rest)
    return bytes(made)


def _read(file: BinaryIO, at: int, size: int = -1) -> bytes:
    file.seek(at)
    return file.read(size)


def _stated(file: BinaryIO) -> Size | None:
    """The size by the header; None for other formats, and for headers that are not whole."""
    head = _read(file, 0, HEAD)
    if len(head) < HEAD:
        return None
    if head[:4] == b".snd":
        start, value = struct.unpack_from(">II", head, 4)
        return Size(8, ">I", value, start)
    if head[:4] == b"caff":
        return _caf(file)
    if head[8:12] != b"WAVE" or head[:4] not in (b"RIFF", b"RIFX", b"RF64"):
        return None
    order, large = ">" if head[:4] == b"RIFX" else "<", None
    for name, start, size in chunks(file, order):
        if name == b"ds64" and head[:4] == b"RF64":
            (value,) = struct.unpack("<Q", _read(file, start + 8, 8).ljust(8, b"\0"))
            large = Size(start + 8, "<Q", value, 0, order)
        if name == b"data":
            return (
                large._replace(start=start)
                if large
                else (Size(start - 4, f"{order}I", size, start, order))
            )
    return None


def chunks(file: BinaryIO, order: str = "<", start: int = HEAD) -> Iterator[tuple[bytes, int, int]]:
    """(name, first byte of its content, size that it states) of the chunks of a WAV file.

    Args:
      file: any file.
      order: of the bytes of a number, as `struct` has it.
      start: place of the first chunk.
    """
    at = start
    for _ in range(MOST_CHUNKS):
        head = _read(file, at, 8)
        if len(head) < 8:
            return
        name, size = struct.unpack(f"{order}4sI", head)
        yield name, at + 8, size
        at += 8 + size + size % 2


def _caf(file: BinaryIO) -> Size | None:
    at = 8
    for _ in range(MOST_CHUNKS):
        head = _read(file, at, 12)
        if len(head) < 12:
            return None
        name, size = struct.unpack(">4sq", head)
        if name == b"data":
            return Size(at + 4, ">q", size, at + 12)
        at += 12 + min(max(size, 0), BEYOND)
    return None


def _are_chunks(content: bytes, start: int, order: str) -> bool:
    """Whether chunks with names fill what is behind an empty recording to the last byte."""
    at = start
    for name, first, size in chunks(io.BytesIO(content), order, start):
        if not (name.isascii() and name.decode("ascii").isprintable()):
            return False
        at = first + size + size % 2
    return at in (len(content), len(content) + 1)


def _flac(file: BinaryIO) -> bytes | None:
    """The same for FLAC, whose frames say how many samples each of them holds."""
    head = _read(file, 0, FLAC_TOTAL + 5)
    if len(head) < FLAC_TOTAL + 5 or int.from_bytes(head[FLAC_TOTAL:]) & (1 << 36) - 1:
        return None
    content = _read(file, 0)
    above = content[FLAC_TOTAL] & 0xF0
    total = (above << 32) | in_packets(content, "flac")
    return content[:FLAC_TOTAL] + total.to_bytes(5) + content[FLAC_TOTAL + 5 :]


def in_packets(content: bytes, form: str) -> int:
    """Samples of each channel in the packets of a recording, none of which is decoded.

    Args:
      content: of the file.
      form: FFmpeg's name of its format.

    Returns:
      0 where the file is of another format.
    """
    import av
    from av.error import FFmpegError

    try:
        with av.open(io.BytesIO(_unnamed(content)), "r", format=form) as container:
            stream = container.streams.audio[0]
            ticks = sum(packet.duration or 0 for packet in container.demux(stream) if packet.size)
            return round(ticks * (stream.time_base or 0) * stream.sample_rate)
    except (FFmpegError, ValueError, IndexError):
        return 0


def mp3(content: bytes) -> np.ndarray:
    """All samples of an MP3, whatever length it states: `[samples, channels]` float32.

    Raises:
      ValueError: it cannot be decoded.
    """
    import av
    from av.error import FFmpegError

    try:
        with av.open(io.BytesIO(_untagged(_unnamed(content))), "r", format="mp3") as container:
            frames = [frame.to_ndarray() for frame in container.decode(audio=0)]
    except (FFmpegError, IndexError) as error:
        raise ValueError(str(error)) from error
    return np.concatenate(frames, axis=1).T.astype(np.float32)


def _unnamed(content: bytes) -> bytes:
    """A FLAC or MP3 without its tags: FFmpeg looks through all of them for each."""
    if content[:4] == b"fLaC":
        at, last = 4, False
        while not last and at + 4 <= len(content):
            last = content[at] >> 7 == 1
            at += 4 + int.from_bytes(content[at + 1 : at + 4])
        return content[:4] + b"\x80" + content[5:FLAC_FIRST] + content[at:]
    start, end = 0, len(content)
    while content[start : start + 3] == b"ID3":
        start += 10 + _sevens(content[start + 6 : start + 10])
    if content[end - ID3_END : end - ID3_END + 3] == b"TAG":
        end -= ID3_END
    while content[end - APE_END : end - APE_END + 8] == b"APETAGEX":
        end -= APE_END
    return content[start:end]


def _sevens(four: bytes) -> int:
    """The size of a tag: four times seven bits."""
    return sum(byte << 7 * place for place, byte in enumerate(four[::-1]))


def _untagged(content: bytes) -> bytes:
    """An MP3 without its wrong length, behind which a decoder would leave samples out."""
    head = content[:MP3_TAG]
    return head.replace(b"Xing", bytes(4)).replace(b"Info", bytes(4)) + content[MP3_TAG:]
