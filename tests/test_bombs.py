"""Small files that would unpack to anything cost their record, and little time and memory."""

from __future__ import annotations

import functools
import io
import json
import struct
import subprocess
import sys
import time
import zlib

import av
import numpy as np
import pytest
import soundfile
from hanging import Deadly, Hanging
from PIL import Image
from test_media_formats import clip

from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Source
from xllm_jax.data import mixture
from xllm_jax.data.example import Example
from xllm_jax.data.media import image, modalities, speech, video
from xllm_jax.prepare import preparation, score, shard, transforms

MEASURE = """
import resource, sys
from xllm_jax.core.errors import UserError
from xllm_jax.data.media import modalities
import av, numpy, scipy.fft, soundfile, soxr, PIL.Image
found = modalities.stored()[sys.argv[1]]
before = resource.getrusage(resource.RUSAGE_SELF)
try:
    found.read(sys.argv[2])
    told = "read"
except UserError as error:
    told = str(error)
after = resource.getrusage(resource.RUSAGE_SELF)
print(after.ru_maxrss - before.ru_maxrss)
print(after.ru_utime - before.ru_utime)
print(told)
"""


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(path, side, bits, color):
    """A picture of one color."""
    channels = {0: 1, 2: 3, 6: 4}[color]
    packer, row = zlib.compressobj(9), bytes(1 + side * bits * channels // 8)
    rows = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    head = struct.pack(">IIBBBBB", side, side, bits, color, 0, 0, 0)
    parts = chunk(b"IHDR", head), chunk(b"IDAT", rows), chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def deep(path):
    png(path, 9_900, 16, 0)


def transparent(path):
    png(path, 9_900, 8, 6)


def webp(path):
    """Lossless, of one color: the sizes of a small one, overwritten, are all that it takes."""
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (3, 3, 3)).save(stream, "WEBP", lossless=True)
    content = bytearray(stream.getvalue())
    at = content.index(b"VP8L") + 9
    bits = int.from_bytes(content[at : at + 4], "little")
    bits = bits & ~((1 << 28) - 1) | 9_899 | 9_899 << 14
    content[at : at + 4] = bits.to_bytes(4, "little")
    path.write_bytes(content)


def progressive(path):
    Image.new("RGB", (8_500, 8_500)).save(path, "JPEG", progressive=True)
    head = bytearray(path.read_bytes())
    at = head.index(b"\xff\xc2") + 5
    head[at : at + 4] = struct.pack(">HH", 9_900, 9_900)
    path.write_bytes(head)


def jpeg2000(path):
    Image.new("RGB", (4_000, 4_000)).save(path, "JPEG2000")


def large_clip(path, side=3_400):
    with av.open(str(path), "w", format="mpegts" if path.suffix else "mp4") as container:
        stream = container.add_stream("libx264", rate=5)
        stream.width = stream.height = side
        stream.pix_fmt, stream.options = "yuv420p", {"preset": "ultrafast"}
        frame = av.VideoFrame.from_ndarray(np.zeros((side * 3 // 2, side), np.uint8), "yuv420p")
        for packet in [*stream.encode(frame), *stream.encode()]:
            container.mux(packet)


def hour(path):
    with soundfile.SoundFile(path, "w", 16_000, 1, format="FLAC") as file:
        for _ in range(60):
            file.write(np.zeros(60 * 16_000, np.int16))


BOMBS = {deep: "image", transparent: "image", webp: "image", progressive: "image"}
BOMBS |= {jpeg2000: "image", large_clip: "video", hour: "speech"}


@pytest.mark.parametrize("make", BOMBS, ids=lambda make: make.__name__)
def test_a_bomb_is_refused_before_it_swells(make, tmp_path):
    make(tmp_path / "bomb")
    command = [sys.executable, "-c", MEASURE, BOMBS[make], str(tmp_path / "bomb")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kilobytes, seconds, told = said.splitlines()
    assert "more than" in told or "of no known format" in told, told
    assert int(kilobytes) < 60_000 and float(seconds) < 2.0


def test_large_pictures_are_read_within_the_budget(tmp_path):
    """What is as large as it may be takes about as much as is counted for it."""
    png(tmp_path / "deep", 5_000, 16, 0)
    Image.new("RGB", (5_000, 5_000)).save(tmp_path / "webp", "WEBP", lossless=True)
    for name in ("deep", "webp"):
        command = [sys.executable, "-c", MEASURE, "image", str(tmp_path / name)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        kilobytes, _, told = said.splitlines()
        assert told == "read" and int(kilobytes) * 1024 < image.BUDGET


def test_deep_pictures_keep_their_gray(tmp_path):
    levels = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    Image.fromarray(levels).save(tmp_path / "a.png")
    found = np.asarray(image.read(tmp_path / "a.png"))
    np.testing.assert_array_equal(found, np.repeat(levels[..., None] // 256, 3, -1))


def test_a_photograph_that_is_too_large_is_decoded_smaller(tmp_path):
    slope = np.tile(np.linspace(0, 255, 800).astype(np.uint8), (600, 1))
    Image.fromarray(np.stack([slope, slope[:, ::-1], slope // 2], -1)).save(tmp_path / "a.jpg")
    whole, small = image.read(tmp_path / "a.jpg"), image.read(tmp_path / "a.jpg", 200_000)
    assert whole.size == (800, 600) and small.size == (400, 300)
    gap = image.resize(whole, 50).astype(int) - image.resize(small, 50)
    assert np.abs(gap).max() <= 6
    with pytest.raises(UserError, match="has 800 x 600 pixels, more than 1,000"):
        image.read(tmp_path / "a.jpg", 1_000)


def test_a_clip_that_is_too_large_is_decoded_smaller(tmp_path, monkeypatch):
    clip(tmp_path / "a.avi", "mpeg4")
    whole = video.pictures(tmp_path / "a.avi", 3)
    monkeypatch.setattr("xllm_jax.data.media.video_container.MOST_PIXELS", 2_000)
    small = video.pictures(tmp_path / "a.avi", 3)
    assert whole[0].size == (96, 64) and small[0].size == (48, 32)
    for one, other in zip(whole, small):
        assert abs(np.mean(one) - np.mean(other)) < 2
    monkeypatch.setattr("xllm_jax.data.media.video_container.MOST_PIXELS", 50)
    with pytest.raises(UserError, match="has frames of 6,144 pixels"):
        video.pictures(tmp_path / "a.avi", 3)


def test_frames_that_grow_within_a_clip_are_refused(tmp_path, monkeypatch):
    """The first frames say one size, the later ones another."""
    clip(tmp_path / "a.ts", "libx264")
    large_clip(tmp_path / "b.ts", 1_600)
    both = (tmp_path / "a.ts").read_bytes() + (tmp_path / "b.ts").read_bytes()
    (tmp_path / "c.ts").write_bytes(both)
    assert (1_600, 1_600) in {one.size for one in video.pictures(tmp_path / "c.ts", 30)}
    monkeypatch.setattr("xllm_jax.data.media.video_container.MOST_PIXELS", 10_000)
    assert video.pictures(tmp_path / "a.ts", 3)[0].size == (96, 64)
    try:
        sizes = {one.size for one in video.pictures(tmp_path / "c.ts", 30)}
    except UserError:
        sizes = set()
    assert (1_600, 1_600) not in sizes


def test_sounds_of_usual_length_are_read(tmp_path):
    wave = np.random.default_rng(0).normal(size=(5 * 60 * 16_000, 1)) / 9
    soundfile.write(tmp_path / "a.flac", wave, 16_000)
    assert len(speech.read(tmp_path / "a.flac")) == len(wave)


def test_preparing_leaves_out_what_hangs_or_kills(tmp_path, monkeypatch):
    """By default: a set is met for the first time there."""
    Image.new("RGB", (16, 16)).save(tmp_path / "good.png")
    (tmp_path / "train.csv").write_text(
        "filepath,title\n" + "".join(f"{name}.png,a\n" for name in ("good", "h", "good", "k"))
    )
    for name in "hk":
        (tmp_path / f"{name}.png").write_bytes(b"")
    source = Source("table", str(tmp_path))
    plan = preparation.make("some", source, str(tmp_path / "out"), 8)
    assert plan.deadline == preparation.DEADLINE > 0 and plan.memory == preparation.MEMORY
    plan = preparation.make("some", source, str(tmp_path / "out"), 8, deadline=3.0)
    found = [plan.examples()[n] for n in range(4)]
    for place, kind in ((1, Hanging), (3, Deadly)):
        media = (("image", kind(found[place].media[0][1], b"")),)
        found[place] = type(found[place])(**{**vars(found[place]), "media": media})
    began = time.monotonic()
    note = shard.write(plan, 0, found)
    reasons = [one["reason"] for one in note["rejects"]]
    assert reasons == ["took longer than 3 s to decode", "ended its decoder (SIGSEGV)"]
    assert note["records"] == 2 and time.monotonic() - began < 60
    monkeypatch.setattr(mixture, "read", lambda *_, **__: found)
    monkeypatch.setattr(transforms, "DEADLINE", 3.0)
    usable = transforms.Usable("some", source)
    assert [usable(place)[1] is None for place in range(4)] == [True, False, True, False]


def test_preparing_bounds_memory(tmp_path):
    png(tmp_path / "large.png", 5_000, 8, 2)
    Image.new("RGB", (16, 16)).save(tmp_path / "good.png")
    (tmp_path / "train.csv").write_text("filepath,title\nlarge.png,a\ngood.png,b\n")
    source = Source("table", str(tmp_path))
    for memory, kept in ((0.05, 1), (2.0, 2)):
        plan = preparation.make("some", source, str(tmp_path / f"{kept}"), 8, memory=memory)
        note = shard.write(plan, 0, plan.examples())
        assert note["records"] == kept, note
    about = json.loads((tmp_path / "1/train.plan.json").read_text())
    assert not {"memory", "deadline"} & about.keys()
    same = preparation.make("some", source, str(tmp_path / "2"), 8, deadline=0.0)
    assert plan.identity() == same.identity()


def test_every_modality_is_checked_the_same_here_and_there(tmp_path):
    clip(tmp_path / "a.avi", "mpeg4")
    (tmp_path / "b.avi").write_bytes(b"RIFF\0\0\0\0AVI ")
    source = Source("table", str(tmp_path))
    decoders = shard.Decoders(shard.Data(deadline=60.0, threads=1))
    decoders.check("video", str(tmp_path / "a.avi"), source)
    told = []
    for check in (modalities.check, decoders.check):
        with pytest.raises(UserError) as error:
            check("video", str(tmp_path / "b.avi"), source)
        told.append(str(error.value))
    decoders.close()
    assert told[0] == told[1]


def test_scoring_leaves_out_what_hangs(tmp_path):
    """As CLIP's scores are computed: a hanging picture costs its record."""
    Image.new("RGB", (16, 16), (9, 9, 9)).save(tmp_path / "good.png")
    good, bad = str(tmp_path / "good.png"), Hanging("h.png", b"")
    found = [Example(path, answer="words", media=(("image", path),)) for path in (bad, good)]
    decoders = shard.Decoders(shard.Data(deadline=2.0, threads=1))
    square = functools.partial(decoders.square, side=8)
    rejected, kept = (score._read(found, square, "some", place) for place in (0, 1))
    decoders.close()
    assert rejected["reason"] == "took longer than 2 s to decode"
    np.testing.assert_array_equal(kept[0], image.square(good, 8))
