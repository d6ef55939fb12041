"""Frames are chosen by the times at which they are shown, whatever the header counts.

What is right comes from a reading of all shown frames: PyAV decodes a file from end to end, and
the frame at the center of each equal part of the time is looked up by hand.
"""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

import av
import gray_video
import numpy as np
import pytest

from xllm_jax.data.media import video, video_readings
from xllm_jax.data.media.video_times import Stamp, Timeline, timeline, uniform_frames

FORMS = {
    "whole.mp4": ("libx264", {}, {}),
    "fragments.mp4": ("libx264", {"movflags": "frag_keyframe"}, {"g": "8"}),
    "empty_moov.mp4": ("libx264", {"movflags": "frag_keyframe+empty_moov"}, {"g": "8"}),
    "clip.mov": ("libx265", {}, {"x265-params": "log-level=error:keyint=8:open-gop=1"}),
    "clip.mkv": ("libx264", {}, {"x264-params": "open-gop=1:keyint=8:scenecut=0"}),
    "clip.webm": ("libvpx-vp9", {}, {}),
    "eight.webm": ("libvpx", {}, {}),
    "clip.avi": ("mpeg4", {}, {"bf": "2", "b_qfactor": "0.5", "b_qoffset": "0"}),
    "unordered.avi": ("libx264", {}, {"bf": "3"}),
    "clip.ts": ("libx264", {}, {"g": "8"}),
    "clip.flv": ("libx264", {}, {}),
    "clip.wmv": ("wmv2", {}, {}),
}
WANTED = [2, 7, 12, 16, 21]  # of 24 frames of equal length


def read(path: Path | str, frames: int = 5, **options: str) -> list[int]:
    return gray_video.numbers(video.load(path, {"frames": frames, "size": 16, **options}))


def shown(path: Path) -> list[tuple[float, int]]:
    """(seconds behind the first, number) of every frame that a decoder shows."""
    with av.open(str(path)) as container:
        found = [
            (float(f.time or 0), round(f.to_ndarray(format="rgb24").mean() / gray_video.STEP))
            for f in container.decode(video=0)
        ]
    return [(time - found[0][0], number) for time, number in found]


def patch_count(path: Path, count: int) -> None:
    """Writes another number of frames into an AVI's headers, as a recorder that was cut off."""
    content = bytearray(path.read_bytes())
    struct.pack_into("<I", content, content.find(b"strh") + 8 + 32, count)
    struct.pack_into("<I", content, content.find(b"avih") + 8 + 16, count)
    path.write_bytes(content)


@pytest.mark.parametrize("name", FORMS)
def test_frames_of_equal_length_are_those_at_the_centers(tmp_path, name):
    codec, form, coding = FORMS[name]
    path = gray_video.write(tmp_path / name, 24, codec, form, coding)
    assert len(shown(path)) == 24
    assert read(path) == WANTED
    assert read(f"{path}#t=1,2", 4) == [9, 11, 13, 15]


@pytest.mark.parametrize("count", [1, 8, 25, 5000])
@pytest.mark.parametrize("codec", ["mpeg4", "mjpeg"])
def test_a_count_in_the_header_changes_nothing(tmp_path, codec, count):
    path = gray_video.write(tmp_path / "clip.avi", 24, codec)
    patch_count(path, count)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == count
    assert read(path) == WANTED
    assert read(path, 4, sampling="reference")[:3] == [0, 8, 16]


UNEVEN = [0, 100, 200, 300, 400, 500, 600, 700, 1700, 2700, 3700, 3800]


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.mp4", "libx264"),
        ("a.mp4", "mpeg4"),
        ("a.mkv", "libx264"),
        ("a.webm", "libvpx-vp9"),
        ("b.webm", "libvpx"),
        ("a.flv", "libx264"),
        ("a.ts", "libx264"),
    ],
)
def test_frames_of_uneven_length_are_chosen_by_time(tmp_path, name, codec):
    path = gray_video.write(tmp_path / name, UNEVEN, codec)
    times = [time for time, _ in shown(path)]
    np.testing.assert_allclose(times, np.array(UNEVEN) / 1000, atol=0.002)
    for frames in (1, 2, 4, 7):
        centers = (2 * np.arange(frames) + 1) * 3.9 / (2 * frames)
        wanted = [max(n for n, time in enumerate(times) if time <= at + 1e-3) for at in centers]
        assert read(path, frames) == wanted
    assert read(f"{path}#t=0.5,3.5", 3) == [7, 8, 9]


def remuxed(source: Path, target: Path, change) -> Path:
    """Copies a video with packets as `change(number, bytes)` has them."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        packets = (packet for packet in old.demux(video=0) if packet.size)
        for number, packet in enumerate(packets):
            made = av.Packet(change(number, bytes(packet)))
            made.pts, made.dts, made.duration = packet.pts, packet.dts, packet.duration
            made.time_base, made.stream = packet.time_base, stream
            made.is_keyframe = packet.is_keyframe
            new.mux(made)
    return target


def test_frames_of_vp8_that_are_hidden_are_not_seen(tmp_path):
    source = gray_video.write(tmp_path / "all.webm", 24, "libvpx")
    hidden = {1, 2, 3, 4, 5, 6, 22, 23}

    def hide(number: int, content: bytes) -> bytes:
        return bytes([content[0] & ~0x10]) + content[1:] if number in hidden else content

    path = remuxed(source, tmp_path / "some.webm", hide)
    times = shown(path)
    assert [number for _, number in times] == [n for n in range(24) if n not in hidden]
    assert read(path, 4) == [0, 8, 13, 19]  # 22 frames long: centers at 2.75, 8.25, 13.75, 19.25
    assert read(f"{path}#t=0,1", 4) == [0, 0, 0, 7]


def test_repeated_frames_of_mpeg4_are_no_frames(tmp_path):
    source = gray_video.write(tmp_path / "all.avi", 24, "mpeg4")
    empty = int("01" + "0" + "1" + "000" + "1" + "0" + "0111111", 2)  # a P-VOP that is not coded

    def leave(number: int, content: bytes) -> bytes:
        return b"\0\0\1\xb6" + empty.to_bytes(2, "big") if number in range(6, 12) else content

    path = remuxed(source, tmp_path / "some.avi", leave)
    assert {number for _, number in shown(path)}.isdisjoint(range(6, 12))
    assert read(path, 12) == [1, 3, 5, 5, 5, 5, 13, 15, 17, 19, 21, 23]


def test_recordings_that_follow_each_other_are_one_video(tmp_path):
    parts = [gray_video.write(tmp_path / "a.ts", 12), gray_video.write(tmp_path / "b.ts", 24)]
    late = gray_video.write(tmp_path / "c.ts", [100_000 + 125 * n for n in range(12)])
    path = tmp_path / "back.ts"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    assert read(path, 4) == [4, 1, 10, 19]
    path = tmp_path / "ahead.ts"
    path.write_bytes(parts[0].read_bytes() + late.read_bytes())
    assert read(path, 4) == [3, 9, 3, 9]


def test_times_below_zero_and_far_behind_it(tmp_path):
    for first in (-3000, 0, 500_000):
        times = [first + 125 * n for n in range(24)]
        path = gray_video.write(tmp_path / f"{first}.mkv", times)
        assert read(path) == WANTED
        assert read(f"{path}#t=1,2", 4) == [9, 11, 13, 15]


def test_frames_outside_of_an_edit_list_are_not_seen(tmp_path):
    path = gray_video.write(tmp_path / "clip.mp4", 24, coding={"bf": "0"})
    content = bytearray(path.read_bytes())
    at = content.find(b"elst") + 12  # version, flags, number of entries; then length, start, rate
    with av.open(str(path)) as container:
        tick = container.streams.video[0].time_base
    length, start = 1000, int(Fraction(1) / tick)  # the second second; the movie counts thousandths
    struct.pack_into(">Ii", content, at, length, start)
    path.write_bytes(content)
    assert [number for _, number in shown(path)] == list(range(8, 16))
    assert read(path, 4) == [9, 11, 13, 15]
    assert read(f"{path}#t=0.25,0.75", 2) == [11, 13]


def test_both_readings_give_the_same_frames(tmp_path):
    path = gray_video.write(tmp_path / "clip.mp4", 24, coding={"g": "5", "bf": "2"})
    times = video.span_times(0.4, 2.6, 5)

    def at_times(shown: Timeline) -> list[int]:
        return [shown.at(time) for time in times]

    for pick, part in ((video._of_whole(7, "uniform"), []), (at_times, times)):
        straight = video_readings.by_packets(path, pick, part)
        through = video_readings.by_frames(path, pick, part)
        assert straight is not None and through is not None
        for one, other in zip(straight, through, strict=True):
            np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.parametrize("rate", [12, 15, 24, Fraction(24000, 1001), 25, Fraction(30000, 1001), 60])
def test_stamps_that_are_rounded_to_milliseconds_move_no_frame(rate):
    for count in (1, 2, 24, 97, 240, 1001):
        stamps = [round(Fraction(1000 * n) / rate) for n in range(count)]
        for duration in (int(1000 / rate), round(Fraction(1000) / rate), 0):
            found = [Stamp(stamp, None, duration) for stamp in stamps]
            shown = timeline(found, Fraction(1, 1000), 1 / Fraction(rate))
            for wanted in (1, 2, 3, 5, 8, 12, 24):
                centers = [(2 * part + 1) * count // (2 * wanted) for part in range(wanted)]
                assert uniform_frames(shown, wanted) == centers


def test_a_frame_that_was_left_out_is_no_rounding():
    stamps = [0, 1, 2, 4, 5, 6, 7, 8, 9]  # of an AVI, whose tick is a frame
    found = [Stamp(stamp, None, 1) for stamp in stamps]
    shown = timeline(found, Fraction(1, 10), Fraction(1, 10))
    assert not shown.even and uniform_frames(shown, 10) == [0, 1, 2, 2, 3, 4, 5, 6, 7, 8]
    held = [Stamp(n, None, 1 if n < 4 else 6) for n in range(5)]  # the last one stays
    shown = timeline(held, Fraction(1, 10), Fraction(1, 10))
    assert uniform_frames(shown, 5) == [1, 3, 4, 4, 4]
