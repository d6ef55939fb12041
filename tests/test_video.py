"""Frame selection against the recorded one, real files, and files that cannot be read."""

from __future__ import annotations

import json
from fractions import Fraction

import av
import numpy as np
import pytest

from xllm_jax.core.errors import UserError
from xllm_jax.data.media import image, video, video_packets, video_readings, video_times
from xllm_jax.data.media.video_times import Stamp


def write(path, count: int, rate: int = 10, size: tuple[int, int] = (96, 64)) -> None:
    """A video whose frame n has the gray level 8 n."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.options = {"qscale": "2"}
        for number in range(count):
            pixels = np.full((size[1], size[0], 3), 8 * number, np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def levels(values: np.ndarray) -> list[int]:
    """Which frame each loaded frame is."""
    gray = (values * image.STD + image.MEAN).mean((1, 2, 3)) * 255
    return [round(level / 8) for level in gray]


@pytest.mark.golden
def test_reference_sampling_is_the_recorded_one(golden):
    cases = json.loads((golden / "vision/cases_frame_selection.json").read_text())
    for case in cases:
        count, rate = case["frame_count"], case["fps"]
        assert video.reference_frames(count, rate) == case["frames_read_ok"]
        kept = case["frames_kept(value = frame index mod 251, null = zero frame)"]
        mask = case["video_mask(not passed to the model)"]
        ours = video.reference_frames(count, rate)[: len(kept)]
        assert [number % 251 for number in ours] == [value for value in kept if value is not None]
        assert mask == [1] * len(ours) + [0] * (len(kept) - len(ours))


def uniform(count: int, wanted: int) -> list[int]:
    """Frames chosen of a video of so many equally long ones."""
    tick = Fraction(1, 30)
    shown = video_times.timeline([Stamp(n, None, 1) for n in range(count)], tick, tick)
    return video_times.uniform_frames(shown, wanted)


def test_uniform_frames_are_centers_and_repeat_in_short_videos():
    assert uniform(100, 5) == [10, 30, 50, 70, 90]
    assert uniform(8, 4) == [1, 3, 5, 7]
    assert uniform(2, 5) == [0, 0, 1, 1, 1]
    assert uniform(1, 3) == [0, 0, 0]
    for count in range(1, 40):
        for wanted in range(1, 12):
            centers = [(2 * part + 1) * count // (2 * wanted) for part in range(wanted)]
            assert uniform(count, wanted) == centers


@pytest.mark.parametrize("suffix", ["mp4", "avi", "mkv"])
def test_frames_of_real_files(tmp_path, suffix):
    path = tmp_path / f"clip.{suffix}"
    write(path, 30)
    values = video.load(path, {"frames": 5, "size": 32, "scale": (0.5, 1.0)})
    assert values.shape == (5, 32, 32, 3) and values.dtype == np.float32
    assert levels(values) == [3, 9, 15, 21, 27]
    values = video.load(path, {"frames": 5, "size": 32, "sampling": "reference"})
    assert levels(values[:3]) == [0, 10, 20] and not np.any(values[3:])


KINDS = {
    "h264": ("libx264", {"g": "14", "bf": "3"}),
    "open h264": ("libx264", {"g": "14", "bf": "3", "x264-params": "open-gop=1:scenecut=0"}),
    "mpeg4": ("mpeg4", {"g": "10", "bf": "2"}),
    "vp9": ("libvpx-vp9", {"g": "12", "deadline": "realtime", "cpu-used": "8"}),
}


@pytest.fixture(scope="module", params=KINDS)
def moving(request, tmp_path_factory):
    """A clip of 40 moving pictures with frames that refer back and ahead, and all its frames."""
    codec, options = KINDS[request.param]
    path = tmp_path_factory.mktemp("moving") / "clip.mkv"
    scene = np.random.default_rng(0).integers(0, 255, (60, 120, 3), np.uint8).repeat(2, 0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.options = 80, 64, "yuv420p", options
        for number in range(40):
            pixels = np.ascontiguousarray(scene[number : number + 64, number : number + 80])
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    with av.open(str(path)) as container:
        return path, [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@pytest.mark.parametrize("numbers", [range(40), [0], [39], [13, 14, 15], [3, 17, 29], [12, 28]])
def test_frames_decoded_alone_are_those_of_the_whole_clip(moving, numbers):
    path, frames = moving
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        found = video_packets.collect(container.demux(stream))
        pictures = video_packets.pictures(stream.codec_context, found, numbers)
    assert sorted(pictures) == list(numbers)
    for number, picture in pictures.items():
        np.testing.assert_array_equal(np.asarray(picture), frames[number])


@pytest.mark.parametrize("times", [[0.0], [0.31, 0.32, 0.9], [0.5, 1.55], [1.2, 1.9], [1.56, 3.0]])
def test_pictures_at_some_times_are_those_of_decoding_through(moving, times):
    path, frames = moving
    exact = [Fraction(time) for time in times]

    def pick(shown: video_times.Timeline) -> list[int]:
        return [shown.at(time) for time in exact]

    straight = video_readings.by_packets(path, pick, exact)
    through = video_readings.by_frames(path, pick, exact)
    assert through is not None
    for one, other in zip(straight or through, through, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    assert straight or times[0] > len(frames) / 25 - 0.05
    shown = [frames[min(int(time * 25 + 1e-3), len(frames) - 1)] for time in times]
    np.testing.assert_array_equal(np.stack([np.asarray(one) for one in through]), shown)


def test_only_stretches_behind_key_frames_are_decoded():
    times = [0, 3, 1, 2, 6, 4, 5, 7, 8]  # key frames 0 and 4; 5 and 6 are shown before the latter
    assert video_packets.spans(times, [0, 4], {2}) == [(0, 2)]
    assert video_packets.spans(times, [0, 4], {4, 7}) == [(4, 7)]
    assert video_packets.spans(times, [0, 4], {1, 5, 8}) == [(0, 5), (4, 8)]


def test_short_videos_repeat_frames(tmp_path):
    path = tmp_path / "short.mp4"
    write(path, 2)
    assert levels(video.load(path, {"frames": 4, "size": 16})) == [0, 0, 1, 1]


def test_unreadable_files_are_told_by_name(tmp_path):
    good = tmp_path / "good.mp4"
    write(good, 20)
    content = good.read_bytes()
    audio = tmp_path / "audio.wav"
    with av.open(str(audio), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1600), np.int16), layout="mono")
        frame.sample_rate = 16000
        for packet in [*stream.encode(frame), *stream.encode()]:
            container.mux(packet)
    for name, part in {
        "cut.mp4": content[: len(content) // 3],
        "text.mp4": b"no video",
        "e.mp4": b"",
    }.items():
        (tmp_path / name).write_bytes(part)
        with pytest.raises(UserError, match=name):
            video.load(tmp_path / name, {})
    with pytest.raises(UserError, match="no such video file"):
        video.load(tmp_path / "missing.mp4", {})
    with pytest.raises(UserError, match="no video stream"):
        video.load(audio, {})
    with pytest.raises(UserError, match="unknown sampling"):
        video.load(good, {"sampling": "random"})


def test_frames_are_cropped_to_the_center():
    from PIL import Image

    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[:, 32:96] = 200
    assert np.all(video.center(Image.fromarray(pixels), 64) == 200)
    assert video.center(Image.fromarray(pixels.swapaxes(0, 1)), 32).shape == (32, 32, 3)
