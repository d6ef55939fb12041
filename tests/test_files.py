"""Media inside archives, spans of videos and bytes of rows are read like files of their own."""

import io
import pickle

import av
import numpy as np
import pytest
import soundfile
from PIL import Image

from xllm_jax.core.errors import UserError
from xllm_jax.data.media import image, paths, speech, video

RATE = 10


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Six seconds of ten frames each, whose gray is 4 x their number; one key frame in 12."""
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=RATE)
        stream.width = stream.height = 32
        stream.pix_fmt, stream.bit_rate, stream.gop_size = "yuv420p", 4_000_000, 12
        for number in range(6 * RATE):
            gray = np.full((32, 32, 3), 4 * number, np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(gray)):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def numbers(frames):
    """Frame numbers by their gray."""
    gray = frames[..., 0].mean(axis=(1, 2)) * image.STD[0] + image.MEAN[0]
    return np.round(gray * 255 / 4).astype(int).tolist()


def test_paths_are_taken_apart():
    assert paths.place("a::b.jpg") == paths.Place("a::b.jpg")
    assert paths.place(paths.part("x.tar", 512, 7)) == paths.Place("x.tar", (512, 7))
    assert paths.place(paths.span("v.mp4", 1, 2.5)) == paths.Place("v.mp4", None, (1.0, 2.5))
    both = paths.span(paths.part("x.tar", 3, 4), 0, 1)
    assert paths.place(both) == paths.Place("x.tar", (3, 4), (0.0, 1.0))


def test_every_medium_is_read_from_an_archive_and_from_a_row(clip, tmp_path):
    picture = tmp_path / "a.png"
    Image.fromarray(np.arange(4800, dtype=np.uint8).reshape(40, 40, 3)).save(picture)
    sound = tmp_path / "a.flac"
    soundfile.write(sound, np.sin(np.arange(8000) / 9), 16000)
    places = {}
    with open(tmp_path / "all.bin", "wb") as archive:
        for path in (picture, sound, clip):
            archive.write(b"between")
            start = archive.tell()
            archive.write(path.read_bytes())
            places[path] = paths.part(tmp_path / "all.bin", start, path.stat().st_size)
    loaders = {picture: image.load, sound: speech.load, clip: video.load}
    for path, load in loaders.items():
        carried = pickle.loads(pickle.dumps(paths.Carried(f"rows/{path}", path.read_bytes())))
        for place in (places[path], carried):
            np.testing.assert_array_equal(load(place, {"size": 32}), load(path, {"size": 32}))
    assert speech.count_frames(places[sound]) == speech.count_frames(sound)
    inside = video.load(paths.span(places[clip], 1, 3), {"frames": 4, "size": 32})
    assert numbers(inside) == [12, 17, 22, 27]


@pytest.mark.parametrize(
    ("start", "end", "sampling", "wanted"),
    [
        (0, 6, "uniform", [6, 18, 30, 42, 54]),
        (2.0, 2.5, "uniform", [20, 21, 22, 23, 24]),
        (5.0, 9.0, "uniform", [54, 59, 59, 59, 59]),  # the video ends first
        (1.0, 4.0, "reference", [10, 20, 30]),
    ],
)
def test_spans_of_a_video(clip, start, end, sampling, wanted):
    path = paths.span(clip, start, end)
    frames = video.load(path, {"frames": 5, "size": 32, "sampling": sampling})
    assert numbers(frames[: len(wanted)]) == wanted
    assert not frames[len(wanted) :].any()


def test_mistakes_are_told(clip, tmp_path):
    (tmp_path / "short.tar").write_bytes(b"12345")
    wrong = {
        "ends 5 bytes before": lambda: image.load(paths.part(tmp_path / "short.tar", 3, 7), {}),
        "no such image file": lambda: image.load(paths.part(tmp_path / "no.tar", 3, 7), {}),
        "cannot be read as an image": lambda: image.load(paths.Carried("row 3", b"not one"), {}),
        "only videos have spans": lambda: speech.load(paths.span(tmp_path / "a.wav", 1, 2)),
        "has no frame at 9.": lambda: video.load(paths.span(clip, 9, 10), {}),
        "has no length": lambda: video.load(paths.span(clip, 3, 3), {}),
        "unknown sampling": lambda: video.load(paths.span(clip, 1, 3), {"sampling": "x"}),
        "no such video file": lambda: video.load(paths.span(tmp_path / "no.mp4", 1, 3), {}),
    }
    for message, load in wrong.items():
        with pytest.raises(UserError, match=message):
            load()
    assert isinstance(paths.source(paths.Carried("a", b"b")), io.BytesIO)
