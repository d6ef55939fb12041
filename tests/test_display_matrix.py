"""Videos are turned and mirrored as their display matrix says, by whichever way they are read."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import av
import gray_video
import numpy as np
import pytest
from PIL import Image

from xllm_jax.data.media import display_matrix, video, video_readings

ONE = 1 << 16
# {name: (a, b, c, d)} where a pixel (x, y) is shown at (a x + c y, b x + d y), moved into view.
MATRICES = {
    "as it is": (1, 0, 0, 1),
    "clockwise": (0, 1, -1, 0),
    "half": (-1, 0, 0, -1),
    "counterclockwise": (0, -1, 1, 0),
    "mirrored": (-1, 0, 0, 1),
    "upside down": (1, 0, 0, -1),
    "transposed": (0, 1, 1, 0),
    "transversed": (0, -1, -1, 0),
}


def nine(a: float, b: float, c: float, d: float) -> tuple[int, ...]:
    return round(a * ONE), round(b * ONE), 0, round(c * ONE), round(d * ONE), 0, 0, 0, 1 << 30


def moved(pixels: np.ndarray, a: int, b: int, c: int, d: int) -> np.ndarray:
    """Every pixel `[height, width, 3]` put where the matrix sends it."""
    y, x = np.indices(pixels.shape[:2])
    right, down = a * x + c * y, b * x + d * y
    right, down = right - right.min(), down - down.min()
    made = np.zeros((down.max() + 1, right.max() + 1, 3), np.uint8)
    made[down, right] = pixels
    return made


@pytest.fixture(scope="module")
def corners(tmp_path_factory) -> Path:
    """Two seconds of four corners of different colors."""
    path = tmp_path_factory.mktemp("corners") / "clip.mp4"
    pixels = np.zeros((64, 96, 3), np.uint8)
    pixels[:32, :48], pixels[:32, 48:], pixels[32:, :48] = (230, 20, 20), (20, 230, 20), 200
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for _ in range(16):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        container.mux(stream.encode())
    return path


def turned(source: Path, target: Path, matrix: tuple[int, ...]) -> Path:
    content = bytearray(source.read_bytes())
    struct.pack_into(">9i", content, content.find(b"tkhd") + 44, *matrix)
    target.write_bytes(content)
    return target


@pytest.mark.parametrize("name", MATRICES)
def test_a_video_is_shown_as_its_matrix_says(corners, tmp_path, name):
    path = turned(corners, tmp_path / "clip.mp4", nine(*MATRICES[name]))
    with av.open(str(path)) as container:
        coded = next(container.decode(video=0)).to_ndarray(format="rgb24")
    wanted = moved(coded, *MATRICES[name])
    for place in (path, f"{path}#t=0.5,1.5"):
        (picture,) = video.pictures(place, 1)
        assert np.abs(np.asarray(picture).astype(int) - wanted).max() <= 3
        loaded = video.load(place, {"frames": 1, "size": 32})[0]
        np.testing.assert_allclose(
            loaded, video.image.normalize(video.center(Image.fromarray(wanted), 32)), atol=0.1
        )
    for read in (video_readings.by_packets, video_readings.by_frames):
        found = read(path, lambda shown: [3])
        assert found is not None
        np.testing.assert_array_equal(np.asarray(found[0]), wanted)


@pytest.mark.parametrize("degrees", [30, 135, 200, 300])
def test_other_angles_turn_the_picture_in_its_frame(corners, tmp_path, degrees):
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    path = turned(corners, tmp_path / "clip.mp4", nine(cos, sin, -sin, cos))
    (picture,) = video.pictures(path, 1)
    assert picture.size == (96, 64)
    # The point 12 pixels above the center and 18 to the left is of the first corner's color.
    x, y = -18 * cos + 12 * sin, -18 * sin - 12 * cos
    assert picture.getpixel((round(48 + x), round(32 + y)))[0] > 200
    assert picture.getpixel((round(48 - x), round(32 - y)))[0] < 60


def test_a_matrix_of_zeros_turns_nothing():
    picture = Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3))
    assert display_matrix.upright(picture, (0,) * 9) is picture


def test_frames_of_a_matroska_file_without_a_matrix_stay_as_they_are(tmp_path):
    path = gray_video.write(tmp_path / "clip.mkv", 8)
    assert video.pictures(path, 1)[0].size == (96, 64)
