"""Recordings whose header was written before their length was known hold samples to their end."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile

from xllm_jax.core.errors import UserError
from xllm_jax.data.media import paths, speech, unsized

SOUND = (0.3 * np.sin(np.arange(32_000) / 9)).astype(np.float32)


def written(form: str, subtype: str = "PCM_16", sound: np.ndarray = SOUND) -> bytearray:
    stream = io.BytesIO()
    soundfile.write(stream, sound, 16_000, format=form, subtype=subtype)
    return bytearray(stream.getvalue())


def behind(content: bytes, name: bytes) -> int:
    return content.find(name) + len(name)


def wav(content: bytearray, size: int) -> None:
    struct.pack_into("<I", content, behind(content, b"data"), size & 0xFFFFFFFF)
    struct.pack_into("<I", content, 4, size & 0xFFFFFFFF)


def rf64(content: bytearray, size: int) -> None:
    struct.pack_into("<QQQ", content, behind(content, b"ds64") + 4, 0, size, 0)


def au(content: bytearray, size: int) -> None:
    struct.pack_into(">I", content, 8, size & 0xFFFFFFFF)


def aiff(content: bytearray, size: int) -> None:
    struct.pack_into(">I", content, behind(content, b"SSND"), size & 0xFFFFFFFF)
    struct.pack_into(">I", content, behind(content, b"COMM") + 6, size & 0xFFFFFFFF)


def caf(content: bytearray, size: int) -> None:
    struct.pack_into(">q", content, behind(content, b"data"), size)


def flac(content: bytearray, size: int) -> None:
    content[21] &= 0xF0
    content[22:26] = bytes(4)


@pytest.mark.parametrize(
    ("form", "subtype", "forget", "sizes"),
    [
        *(("WAV", kind, wav, (0, -1)) for kind in ("PCM_16", "PCM_24", "FLOAT", "ULAW", "PCM_U8")),
        ("WAVEX", "PCM_16", wav, (0, -1)),
        ("RF64", "PCM_16", rf64, (0,)),
        ("AU", "PCM_16", au, (0, -1)),
        ("AIFF", "PCM_16", aiff, (0, -1)),
        ("CAF", "PCM_16", caf, (0, -1)),
        ("FLAC", "PCM_16", flac, (0,)),
        ("FLAC", "PCM_24", flac, (0,)),
    ],
)
def test_they_are_read_to_their_end(tmp_path, form, subtype, forget, sizes):
    whole = tmp_path / "whole"
    whole.write_bytes(written(form, subtype))
    wanted = speech.read(whole)
    assert len(wanted) == len(SOUND)
    for size in sizes:
        content = written(form, subtype)
        forget(content, size)
        path = tmp_path / f"streamed{size}"
        path.write_bytes(content)
        packed = tmp_path / "packed.tar"
        packed.write_bytes(b"before" + content + b"behind")
        for place in (path, paths.part(packed, 6, len(content)), paths.Carried("row", content)):
            np.testing.assert_array_equal(speech.read(place), wanted)
            assert speech.count_frames(place) == speech.frames_of(len(SOUND)) == 198


def mp3(content: bytearray, frames: int | None) -> bytes:
    """An MP3 of variable rate that states so many frames, or nothing at all."""
    tag = content.find(b"Xing")
    assert tag > 0
    if frames is not None:
        struct.pack_into(">I", content, tag + 8, frames)
        return bytes(content)
    first = content.find(content[:2], tag)  # the frame behind the one that holds the tag
    return bytes(content[first:])


@pytest.mark.parametrize("frames", [None, 0, 3, 1000])
@pytest.mark.parametrize("channels", [1, 2])
def test_the_frames_of_an_mp3_tell_its_length(tmp_path, frames, channels):
    rng, count = np.random.default_rng(0), 160_000
    one = rng.normal(size=count) * 0.1 * np.sin(np.arange(count) / 9000)
    sound = np.stack([one] * channels, axis=1)
    path = tmp_path / "a.mp3"
    soundfile.write(path, sound, 16_000)
    wanted = speech.read(path)
    assert len(wanted) == count
    path.write_bytes(mp3(bytearray(path.read_bytes()), frames))
    found = speech.read(path)
    assert abs(len(found) - count) < 2500
    # Without its header an MP3 also forgets how much its encoder has put before the sound.
    shifts = [np.abs(found[s : s + 90_000] - wanted[:90_000]).mean() for s in range(0, 1800)]
    assert min(shifts) < 0.02 * np.abs(wanted).mean()


def test_channels_and_an_odd_end_are_kept(tmp_path):
    both = np.stack([SOUND, SOUND[::-1]], axis=1)
    content = written("WAV", sound=both)
    wav(content, 0)
    (tmp_path / "a.wav").write_bytes(content + b"\1")  # half a sample of a recorder that stopped
    wanted = np.rint(both * 32768).clip(-32768, 32767).mean(axis=1)
    np.testing.assert_allclose(speech.read(tmp_path / "a.wav"), wanted, atol=1.01)


def test_chunks_before_the_samples_are_passed(tmp_path):
    content = written("WAV")
    wav(content, 0)
    note = b"LIST" + struct.pack("<I", 5001) + b"x" * 5002
    content[12:12] = note
    (tmp_path / "a.wav").write_bytes(content)
    assert len(speech.read(tmp_path / "a.wav")) == len(SOUND)
    assert speech.count_frames(tmp_path / "a.wav") == 198


@pytest.mark.parametrize("tail", [b"", b"LIST" + struct.pack("<I", 6) + b"INFOab"])
def test_an_empty_recording_stays_empty(tmp_path, tail):
    content = written("WAV", sound=SOUND[:0])
    wav(content, 0)
    (tmp_path / "a.wav").write_bytes(content + tail)
    with pytest.raises(UserError, match="holds no samples"):
        speech.read(tmp_path / "a.wav")
    assert speech.count_frames(tmp_path / "a.wav") == 0


@pytest.mark.parametrize("form", ["WAV", "AU", "AIFF", "CAF", "FLAC", "RF64", "W64"])
def test_files_that_know_their_size_are_left_alone(form):
    assert unsized.mended(io.BytesIO(written(form))) is None


def test_files_of_nothing_but_chunks_end_the_search():
    for head in (b"RIFF\0\0\0\0WAVE", b"caff\0\1\0\0"):
        assert unsized.mended(io.BytesIO(head + bytes(8_000_000))) is None


def test_headers_that_end_too_early_are_no_recordings(tmp_path: Path):
    for form, forget in (("WAV", wav), ("AU", au), ("CAF", caf), ("FLAC", flac), ("RF64", rf64)):
        content = written(form)
        forget(content, 0)
        for length in (0, 4, 11, 12, 20, 26, 40):
            made = unsized.mended(io.BytesIO(content[:length]))
            assert made is None or len(made) == length
