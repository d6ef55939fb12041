"""Every kind of bad file and text, injected: the quarantine is exactly what was injected."""

from __future__ import annotations

import io
import json
import pathlib
import struct
import zlib

import grain
import numpy as np
import pytest
import soundfile
from hanging import Deadly, Hanging
from PIL import Image
from small_stage import TOKENIZER
from test_video import write as write_video

from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Data, Source
from xllm_jax.data import mixture
from xllm_jax.data.example import Example
from xllm_jax.data.media import decode_workers, image, speech
from xllm_jax.data.pipeline import Pipeline
from xllm_jax.data.record import Record
from xllm_jax.data.sources import captions_folder
from xllm_jax.data.text.characters import CharacterVocabulary

SAID = "红色的圆"
SHAPES = {
    "length": 64,
    "answers": 16,
    "items": {"image": 1, "video": 2, "speech": 1},
    "embeddings": {"image": 3, "video": 3, "speech": 8},
    "frames": (200,),
    "image": {"size": 32},
    "video": {"frames": 2},
}


def noise(shape, kind=np.uint8):
    return np.random.default_rng(0).integers(0, np.iinfo(kind).max, shape).astype(kind)


def sound(path, samples=16000, rate=16000, **options):
    wave = np.random.default_rng(0).normal(size=samples).astype(np.float32) / 9
    soundfile.write(path, wave, rate, **options)


def cut(path, name, share=0.5):
    content = path.read_bytes()
    (path.parent / name).write_bytes(content[: int(len(content) * share)])


def bomb(path, side):
    """A small PNG of side x side pixels."""

    def chunk(name, data):
        crc = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + crc

    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    packed = zlib.compress(bytes(side // 8 + 1) * 100)
    parts = chunk(b"IHDR", head), chunk(b"IDAT", packed), chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Good files of every kind, and bad ones made from them."""
    root = tmp_path_factory.mktemp("media")
    picture = Image.fromarray(noise((40, 48, 3)))
    for name in ("good.jpg", "good.png"):
        picture.save(root / name)
    picture.convert("RGBA").save(root / "rgba.png")
    picture.convert("CMYK").save(root / "cmyk.jpg")
    Image.fromarray(noise((40, 48), np.uint16)).save(root / "deep.png")
    for kind in ("wav", "flac"):
        sound(root / f"good.{kind}")
    sound(root / "slow.wav", 8000, 8000)
    write_video(root / "good.mp4", 12)
    for kind in ("jpg", "png", "mp4", "wav", "flac"):
        cut(root / f"good.{kind}", f"cut.{kind}")
        (root / f"noise.{kind}").write_bytes(noise(500).tobytes())
        (root / f"none.{kind}").write_bytes(b"")
    (root / "empty.wav").write_bytes(silent_header())
    bomb(root / "bomb.png", 40_000)
    content = bytearray((root / "good.wav").read_bytes())
    content[24:28] = struct.pack("<I", 7)
    (root / "rate.wav").write_bytes(content)
    with_sound_only(root / "frameless.mp4")
    return root


def silent_header():
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros(0, np.float32), 16000, format="WAV")
    return buffer.getvalue()


def with_sound_only(path):
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        for packet in [*stream.encode(frame), *stream.encode()]:
            container.mux(packet)


MODALITIES = {"jpg": "image", "png": "image", "mp4": "video", "wav": "speech", "flac": "speech"}
GOOD = ("good.jpg", "good.png", "rgba.png", "cmyk.jpg", "deep.png", "good.mp4")
GOOD += ("good.wav", "good.flac", "slow.wav")
BAD = tuple(f"{what}.{kind}" for kind in MODALITIES for what in ("cut", "noise", "none", "absent"))
BAD += ("empty.wav", "rate.wav", "bomb.png", "frameless.mp4")


def example(root, name):
    path = (MODALITIES[name.split(".")[1]], str(root / name))
    return Example(name, (path,), "看", SAID, "vqa", transcript=SAID)


@pytest.fixture
def batches(folder, monkeypatch, tmp_path):
    """Batches of one epoch of the examples, and the lines of the quarantine behind them."""
    CharacterVocabulary.build([SAID]).save(folder / "characters.txt")

    def make(examples, threads=1, **fields):
        data = Data(
            sources={"a": Source("list")},
            tokenizer=str(TOKENIZER),
            characters=str(folder / "characters.txt"),
            examples=len(examples),
            rows=len(examples),
            threads=threads,
            **(SHAPES | {"max_bad_share": 1.0} | fields),
        )
        monkeypatch.setattr(mixture, "read", lambda name, source, root, **_: examples)
        listed = tmp_path / "quarantine.jsonl"
        batch, info = next(Pipeline(data, quarantine=listed).iterate())
        lines = listed.read_text("utf-8").splitlines() if listed.exists() else []
        return batch, info, [json.loads(line) for line in lines]

    return make


def test_the_quarantine_is_the_injections(folder, batches):
    examples = [example(folder, name) for name in GOOD + BAD]
    batch, info, lines = batches(examples)
    assert sorted(line["key"] for line in lines) == sorted(BAD)
    assert {line["file"] for line in lines} == {str(folder / name) for name in BAD}
    assert all(line["reason"] and line["count"] == 1 for line in lines)
    assert info["bad"] == len(BAD) and sorted(info["keys"]) == sorted(GOOD)
    for entry in batch.media.values():
        assert np.isfinite(entry.values).all()


def test_the_reasons_tell_what_is_wrong(folder, batches):
    _, _, lines = batches([example(folder, name) for name in BAD])
    told = {line["key"]: line["reason"] for line in lines}
    for name, words in {
        "absent.jpg": "no such",
        "cut.jpg": "truncated",
        "cut.wav": "is cut off after",
        "empty.wav": "holds no samples",
        "rate.wav": "7 samples a second",
        "bomb.png": "pixels",
        "frameless.mp4": "no video stream",
    }.items():
        assert words in told[name], told[name]


def test_odd_but_whole_pictures_and_rates_are_read(folder):
    plain = np.asarray(image.read(folder / "good.png")).astype(int)
    for name in ("rgba.png", "cmyk.jpg"):
        assert np.abs(np.asarray(image.read(folder / name)) - plain).mean() < 60
    np.testing.assert_array_equal(np.asarray(image.read(folder / "rgba.png")), plain)
    deep = np.asarray(image.read(folder / "deep.png"))[..., 0]
    np.testing.assert_array_equal(deep, noise((40, 48), np.uint16) // 256)
    assert len(speech.read(folder / "slow.wav")) == 16000


def test_texts_that_are_empty_or_not_utf8(folder, batches, tmp_path):
    files = {"a": b"\xe7\xba\xa2", "broken": b"\xe7\xba\xff\xa2", "b": b"ok"}
    for name, said in files.items():
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_bytes(said)
    examples = captions_folder.examples(str(tmp_path))
    empty = Example("empty", (("image", str(tmp_path / "a.png")),), "看", " \n", "vqa")
    _, info, lines = batches([*examples, empty])
    reasons = {pathlib.Path(line["file"]).name: line["reason"] for line in lines}
    assert set(reasons) == {"broken.png", "empty"} and info["examples"] == 2
    assert "UTF-8" in reasons["broken.png"] and "no answer" in reasons["empty"]


@pytest.mark.parametrize("name", ["transcription", "image_text_pairs"])
def test_other_formats_refuse_blank_texts(folder, batches, name, golden):
    kind = {"transcription": "flac"}.get(name, "png")
    full = example(folder, f"good.{kind}")
    blank = Example("blank", full.media, answer=" \t", transcript=" \t")
    vocabulary = str(golden / "vision" / "weights" / "bert-base-uncased")
    fields = {"characters_length": 8, "text_length": 8, "vocabulary": vocabulary}
    _, info, lines = batches([full, blank], batch_format=name, **fields)
    assert [line["key"] for line in lines] == ["blank"] and info["keys"] == [full.key]


@pytest.fixture
def importable(monkeypatch):
    """Workers find this folder's modules, as they must to unpack the paths of `hanging`."""
    monkeypatch.setenv("PYTHONPATH", str(pathlib.Path(__file__).parent))


def test_a_hanging_and_a_dying_decoder_cost_one_record_each(folder, batches, importable):
    good = [example(folder, name) for name in ("good.png", "good.flac", "good.mp4")]
    bad = [
        Example(str(path), (("image", path),), "看", SAID, "vqa")
        for path in (Hanging("hangs.png", b""), Deadly("kills.png", b""))
    ]
    batch, info, lines = batches([bad[0], *good, bad[1]], deadline=5.0)
    told = {line["file"]: line["reason"] for line in lines}
    assert told == {
        "hangs.png": "took longer than 5 s to decode",
        "kills.png": "ended its decoder (SIGSEGV)",
    }
    assert sorted(info["keys"]) == sorted(one.key for one in good)
    plain, _, _ = batches([bad[0], *good, bad[1]][1:4])
    for name, entry in plain.media.items():
        row = info["keys"].index(next(one.key for one in good if one.media[0][0] == name))
        assert entry.values.any() and row >= 0
        np.testing.assert_array_equal(
            np.sort(batch.media[name].values, axis=None)[-1], entry.values.max()
        )


def test_a_worker_gives_what_a_thread_gives(folder, batches):
    data = Data(deadline=60.0, threads=1, **SHAPES)
    decoders = decode_workers.Decoders(data)
    record = Record(example(folder, "good.png"), "a", 2, 5, 7)
    augmented = Data(**(SHAPES | {"image": {"size": 32, "scale": (0.5, 1.0), "flip": True}}))
    for name in ("good.png", "good.flac", "good.mp4"):
        modality, path = example(folder, name).media[0]
        arguments = (modality, path, augmented, record, 0, True)
        for one, other in zip(
            decoders.load(*arguments), decode_workers.modalities.load(*arguments)
        ):
            np.testing.assert_array_equal(one, other)
    with pytest.raises(UserError) as here:
        decode_workers.modalities.load("image", str(folder / "cut.png"), augmented, record, 0, True)
    with pytest.raises(UserError) as there:
        decoders.load("image", str(folder / "cut.png"), augmented, record, 0, True)
    assert str(here.value) == str(there.value) and here.value.field == there.value.field
    decoders.close()


def test_a_file_that_takes_too_much_memory_costs_one_record(folder, tmp_path):
    """A picture that is small on disk, and of which every pixel takes memory."""
    large, small = tmp_path / "large.png", str(folder / "good.png")
    Image.new("L", (9000, 9000)).save(large)
    data = Data(deadline=60.0, memory=0.1, threads=1, **SHAPES)
    decoders, record = (
        decode_workers.Decoders(data),
        Record(example(folder, "good.png"), "a", 2, 5, 7),
    )
    for path in (small, str(large), small):
        arguments = ("image", path, data, record, 0, True)
        if path == small:
            values, _ = decoders.load(*arguments)
            np.testing.assert_array_equal(values, decode_workers.modalities.load(*arguments)[0])
        else:
            with pytest.raises(UserError, match=r"large.png: .*(MemoryError|ended its decoder)"):
                decoders.load(*arguments)
    assert decode_workers.modalities.load("image", str(large), data, record, 0, True)[0].any()
    decoders.close()


def test_a_worker_that_keeps_too_much_is_replaced(folder, monkeypatch):
    data = Data(deadline=60.0, threads=1, **SHAPES)
    decoders, record = (
        decode_workers.Decoders(data),
        Record(example(folder, "good.png"), "a", 2, 5, 7),
    )
    arguments = ("image", str(folder / "good.png"), data, record, 0, True)
    decoders.load(*arguments)
    worker = decoders._idle.get()
    assert 1e7 < worker.resident < 2e9
    decoders._idle.put(worker)
    monkeypatch.setattr(decoders, "_memory", worker.resident // 2)
    decoders.load(*arguments)
    assert decoders._idle.get() is None and worker._process.returncode is not None


def test_batches_wait_within_their_memory(folder, batches, monkeypatch):
    asked = []
    options = grain.ReadOptions
    monkeypatch.setattr(grain, "ReadOptions", lambda **o: asked.append(o) or options(**o))
    good = [example(folder, name) for name in ("good.png", "good.flac", "good.mp4")]
    for waiting in (4.0, 0.002, 0.0):
        batches(good, threads=8, waiting=waiting)
    row = 3 * 32 * 32 * 3 * 4 + 200 * 80 * 4  # an image, two frames, an utterance
    most = int(0.002e9 / (3 * row))
    assert 1 < most < 16
    assert [o["prefetch_buffer_size"] for o in asked] == [16, most, 1]
    assert [o["num_threads"] for o in asked] == [8, most, 1]
