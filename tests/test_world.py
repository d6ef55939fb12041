"""The embedded world against its own ground truth, checked by independent code."""

import collections
import itertools
import json
import os
import pathlib
import subprocess
import sys

import av
import forked
import numpy as np
import pytest
import soundfile
from PIL import Image

from xllm_jax.core.errors import UserError
from xllm_jax.data.synthetic_world import build, language, motion, plan, render, speak
from xllm_jax.data.synthetic_world import scene as world

SIZES = plan.WorldSizes(12, 6, 8, 9, 10, 2, 1, 2, 2, 10, 16, 8, 8, 9, 10)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build.build(tmp_path_factory.mktemp("worlds") / "world", SIZES, workers=0)


def contents(root):
    return {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}


# Scenes and pictures


def test_scenes_obey_their_rules():
    for index in range(500):
        rng = world.generator(1, index)
        scene = world.sample_scene(rng, ("seen", "unseen", "all")[index % 3])
        pairs, places = zip(*((item.pair, item.place) for item in scene.objects))
        assert len(set(pairs)) == len(pairs) == len(set(places)) <= 3
        order = [world.PLACES.index(place) for place in places]
        assert order == sorted(order)
        if index % 3 < 2:
            assert bool(set(pairs) & world.HELD_OUT) == (index % 3 == 1)


def test_held_out_pairs_have_parts_that_are_seen():
    shapes, colors = zip(*world.SEEN_PAIRS)
    assert len(world.HELD_OUT) == 5 and len(world.SEEN_PAIRS) == 25
    assert set(shapes) == set(world.SHAPES) and set(colors) == set(world.COLORS)


def test_training_never_sees_held_out_pairs():
    sizes = plan.WorldSizes().scaled(0.1)
    for name in ("train", "val"):
        split = plan.plan_split(0, name, sizes)
        assert not any(picture.scene.unseen for picture in split.pictures)
        assert not any(video.clip.unseen for video in split.videos)


def test_the_test_split_is_composed_as_promised():
    split = plan.plan_split(0, "test", plan.WorldSizes())
    tags = [picture.caption_tags for picture in split.pictures]
    voices = [utterance.tags for utterance in split.utterances]
    assert sum("unseen_pair" in t for t in tags) == len(tags) / 2
    assert sum("unseen_voice" in t for t in voices) == len(voices) / 2
    for tagged in (tags, voices):
        assert sum("unseen_wording" in t for t in tagged) / len(tagged) == pytest.approx(
            0.25, abs=0.01
        )
    spoken = [voice for talk in split.dialogues for voice in talk.voices if voice]
    assert len(spoken) == 300 and sum(voice.unseen for voice in spoken) == 150
    training = plan.plan_split(0, "train", plan.WorldSizes().scaled(0.1))
    heard = {u.voice.variant for u in training.utterances}
    assert speak.UNSEEN_VARIANT not in heard
    assert max(u.voice.pitch for u in training.utterances) < speak.UNSEEN_PITCHES[0]


def test_every_second_training_utterance_is_a_list_of_words():
    """Neighbors in sentences are few, since wordings are; in lists they are of all kinds."""
    sizes = plan.WorldSizes(train_utterances=800, val_utterances=400, test_utterances=400)
    texts = {
        name: [one.text for one in plan.plan_split(0, name, sizes).utterances]
        for name in plan.SPLITS
    }
    sentences, lists = texts["train"][1::2], texts["train"][::2]
    near = [
        {pair for text in some for pair in itertools.pairwise(text)}
        for some in (sentences, lists, texts["val"], texts["test"])
    ]
    assert len(near[1]) > 5 * len(near[0]) and len(near[1] - near[0]) > 4 * len(near[0])
    assert len(near[2] - near[0]) < 0.2 * len(near[0]) and len(near[3]) < 2 * len(near[0])
    heldout = [color + shape for shape, color in world.HELD_OUT]
    assert not any(pair in text for text in texts["train"] for pair in heldout)
    assert any(pair in text for text in texts["test"] for pair in heldout)


@pytest.mark.parametrize("background", world.BACKGROUNDS)
def test_object_centers_have_the_object_color(background, tmp_path):
    for index in range(12):
        rng = world.generator(2, background, index)
        drawn = world.sample_scene(rng, "all")
        scene = world.Scene(drawn.objects, background, drawn.seed)
        path = tmp_path / "picture.jpg"
        render.render_scene(scene).save(path, quality=90)
        with Image.open(path) as picture:
            pixels = np.asarray(picture, np.float32)
        for item, (_, x, y, *_) in zip(scene.objects, render.sprites(scene)):
            row, column = int(y * 128), int(x * 128)
            assert world.PLACES[row * 3 // 128 * 3 + column * 3 // 128] == item.place
            seen = pixels[row - 1 : row + 2, column - 1 : column + 2].mean((0, 1))
            distance = {name: np.linalg.norm(seen - rgb) for name, rgb in render.RGB.items()}
            assert min(distance, key=distance.get) == item.color


def test_large_and_small_differ_at_64_pixels():
    areas = collections.defaultdict(list)
    for index in range(150):
        scene = world.sample_scene(world.generator(3, index), count=1)
        item = scene.objects[0]
        picture = np.asarray(render.render_scene(scene).resize((64, 64)), np.float32)
        near = np.linalg.norm(picture - render.RGB[item.color], axis=-1) < 70
        areas[item.shape, item.size].append(near.sum())
    for shape in world.SHAPES:
        assert min(areas[shape, "大"]) > 1.5 * max(areas[shape, "小"])


# Clips


@pytest.mark.parametrize("name", motion.MOTIONS)
def test_decoded_clips_show_their_motion(name, tmp_path):
    clip = motion.sample_clip(world.generator(4, name), motion=name)
    motion.write_mp4(tmp_path / "clip.mp4", motion.render_clip(clip))
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert container.streams.video[0].average_rate == motion.RATE
        frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    assert len(frames) == motion.FRAMES and frames[0].shape == (128, 128, 3)
    four = [frames[index].astype(np.float32) for index in (3, 9, 15, 21)]

    def where(color):
        masks = [np.linalg.norm(f - render.RGB[color], axis=-1) < 80 for f in four]
        spots = [np.argwhere(mask) for mask in masks]
        return [(spot.mean(0) if len(spot) else None, len(spot)) for spot in spots]

    seen = where(clip.color)
    sizes = [size for _, size in seen]
    if name in motion.DIRECTIONS:
        across, down = motion.DIRECTIONS[name]
        steps = np.diff([center[::-1] for center, _ in seen], axis=0)
        assert (steps @ (across, down) > 8).all() and (abs(steps @ (down, across)) < 3).all()
    elif name in ("变大", "变小"):
        assert (np.diff(sizes) * (1 if name == "变大" else -1) > 10).all()
    else:
        shown = {"闪烁": [1, 0, 1, 0], "消失": [1, 1, 0, 0], "变色": [1, 1, 0, 0]}[name]
        assert [size > 40 for size in sizes] == shown
        if name == "变色":
            assert [size > 40 for _, size in where(clip.to_color)] == [0, 0, 1, 1]


def test_written_frames_and_captions_tell_the_clip():
    for index in range(300):
        rng = world.generator(5, index)
        clip = motion.sample_clip(rng, ("seen", "unseen")[index % 2])
        for unseen in (False, True):
            for text in language.video_captions(clip, unseen):
                truth = (clip.shape, clip.color, clip.to_color, clip.motion)
                assert language.parse_motion(text) == truth
        frames = language.written_frames(clip, rng)
        for index, sentence in enumerate(frames):
            item = motion.seen_object(clip, (index + 0.5) / 4)
            assert language.parse_objects(sentence) == ({item} if item else set())


# Speech


def test_speech_is_the_same_whatever_was_said_before():
    voices = [speak.sample_voice(world.generator(7, i), unseen=i % 3 == 0) for i in range(12)]
    first = [speak.speak("左上的物体是什么颜色", voice) for voice in voices]
    again = [speak.speak("左上的物体是什么颜色", voice) for voice in voices[::-1]][::-1]
    for one, other, voice in zip(first, again, voices):
        np.testing.assert_array_equal(one, other)
        assert one.dtype == np.float32 and 0.1 < np.abs(one).max() <= 1
        assert 0.8 < len(one) / speak.RATE < 4
        assert (voice.speaker == "S0900") == voice.unseen


@pytest.mark.parametrize("kind", ("white", "pink", "babble"))
def test_noise_has_the_asked_level_and_color(kind):
    base = dict(variant="m1", pitch=50, rate=250, gain=0.3, snr=10.0, seed=1)
    clean = speak.speak("红色圆形在左上", speak.Voice(noise="none", **base))
    noisy = speak.speak("红色圆形在左上", speak.Voice(noise=kind, **base))
    ratio = 10 * np.log10(np.mean(clean**2) / np.mean((noisy - clean) ** 2))
    assert ratio == pytest.approx(10, abs=0.5)
    power = np.abs(np.fft.rfft(noisy - clean)) ** 2
    low = power[: len(power) // 4].sum() / power.sum()
    assert 0.2 < low < 0.3 if kind == "white" else low > 0.6


# Building


def test_files_are_what_they_claim(built):
    sounds = sorted(built.rglob("*.flac"))
    assert len(sounds) == (8 + 2 + 8) + 2 * (6 + 1 + 8)
    for path in sounds:
        info = soundfile.info(path)
        assert (info.samplerate, info.channels, info.subtype) == (16000, 1, "PCM_16")
        assert 0.8 < info.duration < 4
    pictures = sorted((built / "coco").rglob("*.*g"))
    found = set()
    for path in pictures:
        with Image.open(path) as picture:
            found.add((path.suffix, picture.format, picture.size))
    assert found == {(".jpg", "JPEG", (128, 128)), (".png", "PNG", (128, 128))}


def test_builds_are_equal_byte_by_byte_and_repeat_for_free(built, tmp_path):
    told = []
    other = tmp_path / "other"
    build.build(other, SIZES, workers=2, progress=lambda done, total: told.append((done, total)))
    assert contents(built) == contents(other)
    made = [p for kind in ("coco/*/*.*g", "**/*.mp4", "**/*.flac") for p in other.glob(kind)]
    assert told[-1] == (len(made), len(made))
    before = (built / "world.json").stat().st_mtime_ns
    build.build(built, SIZES)
    assert (built / "world.json").stat().st_mtime_ns == before


def test_a_failed_build_leaves_nothing(tmp_path, monkeypatch):
    def fail(path, samples):
        raise OSError("disk full")

    monkeypatch.setattr(build.speak, "write_flac", fail)
    with pytest.raises(OSError, match="disk full"):
        build.build(tmp_path / "world", SIZES, workers=0)
    assert not list(tmp_path.iterdir())


def test_remains_of_a_killed_build_are_removed(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    remains = [tmp_path / f".world.{number}.partial" for number in (ended.pid, os.getppid())]
    for folder in remains:
        folder.mkdir()
    build.build(tmp_path / "world", plan.WorldSizes(*[1] * 15), workers=0)
    assert [folder.exists() for folder in remains] == [False, True]


def test_foreign_directories_are_refused(built, tmp_path):
    with pytest.raises(UserError, match="another seed"):
        build.build(built, SIZES, seed=1)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"no world\.json"):
        build.build(tmp_path, SIZES)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_world_that_appeared_meanwhile_is_kept(tmp_path, monkeypatch):
    target, sizes = tmp_path / "world", plan.WorldSizes(*[1] * 15)
    write = build._write_annotations

    def slow(*arguments):
        write(*arguments)
        target.mkdir()
        (target / "world.json").write_text(json.dumps(build.identity(sizes, 0)))

    monkeypatch.setattr(build, "_write_annotations", slow)
    build.build(target, sizes, workers=0)
    assert [path.name for path in tmp_path.iterdir()] == ["world"]
    assert [path.name for path in target.iterdir()] == ["world.json"]


def test_the_command_builds_and_refuses(tmp_path):
    root = pathlib.Path(__file__).parents[1]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    command = [sys.executable, str(root / "launch" / "world.py"), f"--output={tmp_path / 'mine'}"]
    ran = forked.run(command, capture_output=True, text=True, cwd=root)
    assert ran.returncode == 2 and "no world.json" in ran.stderr.strip().splitlines()[-1]
