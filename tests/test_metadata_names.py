"""Clips and recordings whose metadata has so many names that FFmpeg looks through them for long."""

from __future__ import annotations

import io
import struct

import av
import measured_reading
import numpy as np
import pytest
import soundfile
from test_video_tables import clip

from xllm_jax.data.media import speech, unsized

USUAL, MANY = 100, 10_000
KINDS = ("keys.mp4", "custom.mp4", "udta.mp4", "track.mp4", "avi", "asf", "flv", "late.flv")


def box(kind, *parts):
    content = b"".join(parts)
    return struct.pack(">I4s", 8 + len(content), kind) + content


def within(content, kind, extra):
    """An MP4 with one box more at the end of `kind`, and at the end of all that hold it."""
    found = bytearray(content)
    at = found.index(kind) - 4
    end = at + int.from_bytes(found[at : at + 4])
    found[end:end] = extra
    for parent in {b"moov", kind}:
        head = found.index(parent) - 4
        size = int.from_bytes(found[head : head + 4])
        found[head : head + 4] = struct.pack(">I", size + len(extra))
    return bytes(found)


def value(text=b"v"):
    return box(b"data", struct.pack(">II", 1, 0), text)


def keys(count):
    names = [box(b"mdta", f"{number:06}".encode()) for number in range(count)]
    items = [box(struct.pack(">I", number + 1), value()) for number in range(count)]
    handler = box(b"hdlr", bytes(8), b"mdta", bytes(13))
    listed = box(b"keys", struct.pack(">II", 0, count), *names)
    return box(b"meta", handler, listed, box(b"ilst", *items))


def custom(count):
    names = [box(b"name", bytes(4), f"{number:06}".encode()) for number in range(count)]
    items = [box(b"----", box(b"mean", bytes(4), b"a.b"), name, value()) for name in names]
    handler = box(b"hdlr", bytes(8), b"mdir", b"appl", bytes(9))
    return box(b"udta", box(b"meta", bytes(4), handler, box(b"ilst", *items)))


def languages(count):
    """One name in so many languages, which FFmpeg makes names of."""
    places = [(number // 676 % 26, number // 26 % 26, number % 26) for number in range(count)]
    codes = [(a + 1) << 10 | (b + 1) << 5 | c + 1 for a, b, c in places]
    return box(b"udta", *[box(b"\xa9nam", struct.pack(">HH", 1, code), b"v") for code in codes])


def info(count):
    """A list of names as WAV and AVI have it."""
    names = [bytes(65 + number // 26**place % 26 for place in range(4)) for number in range(count)]
    listed = b"INFO" + b"".join(struct.pack("<4sI2s", name, 2, b"v") for name in names)
    return struct.pack("<4sI", b"LIST", len(listed)) + listed


def asf(count):
    guid = bytes.fromhex("40a4d0d207e3d21197f000a0c95ea850")
    names = [f"{number:06}\0".encode("utf-16-le") for number in range(count)]
    text = "v\0".encode("utf-16-le")
    fields = [struct.pack("<H", 14) + name + struct.pack("<HH", 0, 4) + text for name in names]
    content = struct.pack("<H", count) + b"".join(fields)
    return guid + struct.pack("<Q", 24 + len(content)) + content


def flv(count):
    fields = [struct.pack(">H6sBH4s", 6, b"%06d" % n, 2, 4, b"text") for n in range(count)]
    content = b"\2\0\x0aonMetaData\x08" + struct.pack(">I", count) + b"".join(fields) + b"\0\0\x09"
    size = len(content).to_bytes(3)
    return b"\x12" + size + bytes(7) + content + struct.pack(">I", 11 + len(content))


def named(plain, kind, count):
    """A clip with so many names more."""
    content = plain[kind.rpartition(".")[2]]
    if kind.endswith("mp4"):
        made = {"keys": keys, "custom": custom}.get(kind.partition(".")[0], languages)(count)
        return within(content, b"trak" if kind.startswith("track") else b"moov", made)
    if kind == "asf":
        extra = asf(count)
        (size,) = struct.unpack_from("<Q", content, 16)
        return (
            content[:16]
            + struct.pack("<Q", size + len(extra))
            + content[24:30]
            + (extra + content[30:])
        )
    if kind.endswith("flv"):
        empty = b"\x09" + bytes(10) + struct.pack(">I", 11)
        before = 1500 * empty if kind.startswith("late") else b""
        return content[:13] + before + flv(count) + content[13:]
    return (
        content[:4]
        + struct.pack("<I", len(content) - 8 + len(info(count)))
        + content[8:12]
        + (info(count) + content[12:])
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with clips `COUNT.KIND`."""
    folder = tmp_path_factory.mktemp("names")
    plain = {form: clip(folder / f"whole.{form}", 90, form) for form in ("mp4", "avi", "asf")}
    plain["flv"] = clip(folder / "whole.flv", 90, "flv", codec="flv1")
    for kind in KINDS:
        for count in (USUAL, MANY):
            (folder / f"{count}.{kind}").write_bytes(named(plain, kind, count))
    return folder


def test_ffmpeg_makes_names_of_them(made):
    """That shows that the clips of this file hold what they should."""
    for kind in KINDS:
        with av.open(str(made / f"{USUAL}.{kind}")) as container:
            found = container.streams[0] if kind.startswith("track") else container
            assert len(found.metadata) >= USUAL, kind


def test_too_many_are_refused_and_usual_ones_are_read(made):
    """Before, 10,000 took 0.6 s and 100,000 a hundred times as long."""
    taken = measured_reading.read(
        "video", [made / f"{n}.{k}" for k in KINDS for n in (USUAL, MANY)]
    )
    for kind in KINDS:
        assert taken[f"{USUAL}.{kind}"].told == "read"
        _, seconds, told = taken[f"{MANY}.{kind}"]
        assert "has more metadata than 500 names" in told, (kind, told)
        assert seconds < 0.2, (kind, seconds)


def text_frame(number, text):
    body = b"\3" + b"%06d\0" % number + text
    return b"TXXX" + struct.pack(">I", len(body)) + bytes(2) + body


def sevens(number):
    return bytes(number >> 7 * place & 127 for place in (3, 2, 1, 0))


def test_tags_of_sounds_do_not_reach_ffmpeg(tmp_path):
    """Before, 40,000 in an MP3 or a streamed FLAC took 8 s; the samples stay the same."""
    samples = np.sin(np.arange(16000) / 10) / 2
    contents = {}
    for form in ("MP3", "FLAC"):
        stream = io.BytesIO()
        soundfile.write(stream, samples, 16000, format=form)
        contents[form] = stream.getvalue()
    tag = b"".join(text_frame(number, b"v") for number in range(40_000))
    many = b"ID3\3\0\0" + sevens(len(tag)) + tag + contents["MP3"]
    assert unsized.in_packets(many, "mp3") == unsized.in_packets(contents["MP3"], "mp3") > 16000
    flac = contents["FLAC"]
    names = b"".join(struct.pack("<I", 8) + b"%06d=v" % number for number in range(40_000))
    body = bytes(4) + struct.pack("<I", 40_000) + names
    flac = flac[:4] + b"\0" + flac[5:42] + b"\4" + len(body).to_bytes(3) + body + flac[42:]
    streamed = flac[:21] + bytes([flac[21] & 0xF0]) + bytes(4) + flac[26:]
    (tmp_path / "a.mp3").write_bytes(many)
    (tmp_path / "a.flac").write_bytes(streamed)
    (tmp_path / "b.flac").write_bytes(contents["FLAC"])
    taken = measured_reading.read("speech", [tmp_path / "a.mp3", tmp_path / "a.flac"])
    for name, (_, seconds, told) in taken.items():
        assert told == "read" and seconds < 1, (name, told, seconds)
    read = speech.read(tmp_path / "a.flac")
    np.testing.assert_array_equal(read, speech.read(tmp_path / "b.flac"))
