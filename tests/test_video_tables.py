"""Clips whose tables count what is not there, or whose frames lie in another file."""

from __future__ import annotations

import struct
import zlib

import av
import measured_reading
import numpy as np
import pytest

from xllm_jax.core.errors import UserError
from xllm_jax.data.media import video

PARENTS = (b"moov", b"trak", b"mdia", b"minf", b"dinf")


def clip(path, level, form="mp4", codec="mpeg4", **options):
    with av.open(str(path), "w", format=form, options=options) as container:
        stream = container.add_stream(codec, rate=5)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for number in range(6):
            pixels = np.full((48, 32), level, np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, "yuv420p")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path.read_bytes()


def counted(content, samples):
    """The same clip, all of whose tables count so many samples of one byte."""
    found = bytearray(content)
    for name, place, values in (("stsz", 8, (1, samples)), ("stts", 12, (samples, 1))):
        at = found.index(name.encode()) + place
        found[at : at + 8] = struct.pack(">II", *values)
    at = found.index(b"stsc") + 16
    found[at : at + 4] = struct.pack(">I", samples)
    return bytes(found)


def fragment(content, samples):
    """A fragment that counts so many samples of the usual size and duration."""
    found = bytearray(content)
    at = found.index(b"trun")
    found[at + 4 : at + 12] = struct.pack(">II", 1, samples)
    return bytes(found)


def external(content, target):
    """The same clip without samples of its own: they lie in `target`, by a Macintosh alias."""
    name, place = target.name.encode(), str(target).encode()
    words = place + b"\0" * (len(place) % 2)
    inside = bytes(8) + struct.pack(">H", 200) + bytes(4) + b"\3vol".ljust(28, b"\0") + bytes(12)
    inside += bytes([len(name)]) + name.ljust(63, b"\0") + bytes(16) + struct.pack(">hh", 1, 1)
    inside += bytes(16) + struct.pack(">HH", 2, len(place)) + words + struct.pack(">hh", -1, 0)
    alias = struct.pack(">I", 8 + len(inside)) + b"alis" + inside
    at = content.index(b"dref") - 4
    old = int.from_bytes(content[at : at + 4])
    made = struct.pack(">I", 16 + len(alias)) + b"dref" + bytes(7) + b"\1" + alias
    found = bytearray(content)
    for parent in PARENTS:
        head = found.index(parent) - 4
        size = int.from_bytes(found[head : head + 4]) + len(made) - old
        found[head : head + 4] = struct.pack(">I", size)
    found[at : at + old] = made
    data = found.index(b"mdat")
    end = data - 4 + int.from_bytes(found[data - 4 : data])
    found[data + 4 : end] = bytes(end - data - 4)
    return bytes(found)


def test_tables_that_count_millions_are_refused_before_they_are_made(tmp_path):
    """Before, 80 million samples of a kilobyte took 2.8 GB and 17 s."""
    whole = clip(tmp_path / "whole", 90)
    pieces = clip(tmp_path / "pieces", 90, movflags="frag_keyframe+empty_moov")
    (tmp_path / "table").write_bytes(counted(whole, 80_000_000))
    (tmp_path / "run").write_bytes(fragment(pieces, 60_000_000))
    names = [tmp_path / name for name in ("whole", "pieces", "table", "run")]
    taken = measured_reading.read("video", names)
    assert taken["whole"].told == taken["pieces"].told == "read"
    for name in ("table", "run"):
        assert "samples, more than 4,194,304" in taken[name].told
        assert taken[name].megabytes < 60 and taken[name].seconds < 2


def test_many_small_boxes_are_refused(tmp_path):
    content = clip(tmp_path / "a.mp4", 90)
    (tmp_path / "b.mp4").write_bytes(
        content[: int.from_bytes(content[:4])] + struct.pack(">I4s", 8, b"free") * 150_000
    )
    with pytest.raises(UserError, match="has more than 100,000 boxes"):
        video.pictures(tmp_path / "b.mp4", 2)


def test_a_packed_header_is_refused(tmp_path):
    """Before, its tables were counted by nobody: a kilobyte of them can count millions."""
    content = clip(tmp_path / "a.mov", 90, "mov")
    at = content.index(b"moov") - 4
    size = int.from_bytes(content[at : at + 4])
    packed = struct.pack(">I", size) + zlib.compress(content[at : at + size])
    inside = struct.pack(">I4s4sI4s", 12, b"dcom", b"zlib", 8 + len(packed), b"cmvd") + packed
    head = struct.pack(">I4sI4s", size, b"moov", 8 + len(inside), b"cmov") + inside
    (tmp_path / "b.mov").write_bytes(content[:at] + head.ljust(size, b"\0") + content[at + size :])
    with av.open(str(tmp_path / "b.mov")) as container:
        assert len(list(container.decode(video=0))) == 6
    with pytest.raises(UserError, match="has a packed header"):
        video.pictures(tmp_path / "b.mov", 2)


def test_frames_in_another_file_are_not_read(tmp_path):
    """FFmpeg can, if it is allowed to: that shows that the reference leads to the other file."""
    secret = tmp_path / "secret.mov"
    (tmp_path / "a.mov").write_bytes(external(clip(secret, 235, "mov"), secret))
    allowed = {"enable_drefs": "1", "use_absolute_path": "1"}
    with av.open(str(tmp_path / "a.mov"), options=allowed) as container:
        shown = [frame.to_ndarray(format="gray").mean() for frame in container.decode(video=0)]
    assert len(shown) == 6 and min(shown) > 200
    with pytest.raises(UserError, match="has no frame"):
        video.pictures(tmp_path / "a.mov", 2)
