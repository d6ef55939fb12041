"""The embedded world against its own ground truth, checked by independent code."""

import collections
import re

import av
import numpy as np
import pytest
import soundfile
from PIL import Image

from xllm_jax.core.errors import UserError
from xllm_jax.data import instructions
from xllm_jax.data.world import build, language, motion, plan, questions, render, speak
from xllm_jax.data.world import scene as world
from xllm_jax.data.world.text_stream import text_example, text_examples

SIZES = plan.WorldSizes(12, 6, 8, 9, 10, 2, 1, 2, 2, 10, 16, 8, 8, 9, 10)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build.build(tmp_path_factory.mktemp("worlds") / "world", SIZES, workers=0)


@pytest.fixture(scope="module")
def asked():
    """(scene, question) pairs in training's wordings."""
    pairs = []
    for index in range(6000):
        rng = world.generator(11, "asked", index)
        scene = world.sample_scene(rng)
        pairs.append((scene, questions.ask(scene, rng)))
    return pairs


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
    shapes, colours = zip(*world.SEEN_PAIRS)
    assert len(world.HELD_OUT) == 5 and len(world.SEEN_PAIRS) == 25
    assert set(shapes) == set(world.SHAPES) and set(colours) == set(world.COLOURS)


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


@pytest.mark.parametrize("background", world.BACKGROUNDS)
def test_object_centres_have_the_object_colour(background, tmp_path):
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
            assert min(distance, key=distance.get) == item.colour


def test_large_and_small_differ_at_64_pixels():
    areas = collections.defaultdict(list)
    for index in range(150):
        scene = world.sample_scene(world.generator(3, index), count=1)
        item = scene.objects[0]
        picture = np.asarray(render.render_scene(scene).resize((64, 64)), np.float32)
        near = np.linalg.norm(picture - render.RGB[item.colour], axis=-1) < 70
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

    def where(colour):
        masks = [np.linalg.norm(f - render.RGB[colour], axis=-1) < 80 for f in four]
        spots = [np.argwhere(mask) for mask in masks]
        return [(spot.mean(0) if len(spot) else None, len(spot)) for spot in spots]

    seen = where(clip.colour)
    sizes = [size for _, size in seen]
    if name in motion.DIRECTIONS:
        across, down = motion.DIRECTIONS[name]
        steps = np.diff([centre[::-1] for centre, _ in seen], axis=0)
        assert (steps @ (across, down) > 8).all() and (abs(steps @ (down, across)) < 3).all()
    elif name in ("变大", "变小"):
        assert (np.diff(sizes) * (1 if name == "变大" else -1) > 10).all()
    else:
        shown = {"闪烁": [1, 0, 1, 0], "消失": [1, 1, 0, 0], "变色": [1, 1, 0, 0]}[name]
        assert [size > 40 for size in sizes] == shown
        if name == "变色":
            assert [size > 40 for _, size in where(clip.to_colour)] == [0, 0, 1, 1]


def test_written_frames_and_captions_tell_the_clip():
    for index in range(300):
        rng = world.generator(5, index)
        clip = motion.sample_clip(rng, ("seen", "unseen")[index % 2])
        for unseen in (False, True):
            for text in language.video_captions(clip, unseen):
                truth = (clip.shape, clip.colour, clip.to_colour, clip.motion)
                assert language.parse_motion(text) == truth
        frames = language.written_frames(clip, rng)
        for index, sentence in enumerate(frames):
            item = motion.seen_object(clip, (index + 0.5) / 4)
            assert language.parse_objects(sentence) == ({item} if item else set())


# Language


def test_captions_and_regions_tell_every_object_and_nothing_else():
    for index in range(300):
        rng = world.generator(6, index)
        scene = world.sample_scene(rng, "all")
        for unseen in (False, True):
            for text in language.captions(scene, unseen):
                assert language.parse_objects(text) == set(scene.objects)
            for item in scene.objects:
                assert language.parse_objects(language.region(item, rng, unseen)) == {item}


def words_in(text, values):
    return [value for value in re.findall("|".join(values), text)]


def named(scene, phrase):
    """The objects that fit all words of a phrase."""
    fits = scene.objects
    for name, values in (
        ("place", world.PLACES),
        ("colour", world.COLOURS),
        ("shape", world.SHAPES),
    ):
        for value in words_in(phrase, values):
            fits = [item for item in fits if getattr(item, name) == value]
    return list(fits)


def only(scene, phrase):
    fits = named(scene, phrase)
    assert len(fits) == 1, f"{phrase} is ambiguous in {scene}"
    return fits[0]


def answer(scene, text):
    """Reads a question and answers it from the scene; knows nothing of how it was made."""
    if re.search("几个|多少", text):
        return {1: "一个", 2: "两个", 3: "三个"}[len(scene.objects)]
    if "一样" in text:
        name = next(n for n, w in questions.ANSWER_OF.items() if w in text)
        first, second = (getattr(only(scene, p), name) for p in words_in(text, world.PLACES))
        return "一样" if first == second else "不一样"
    if "更大" in text:
        phrases = words_in(text, world.SHAPES) or words_in(text, world.COLOURS)
        first, second = (only(scene, phrase) for phrase in phrases)
        assert first.size != second.size
        return phrases[0] if first.size == "大" else phrases[1]
    if "有没有" in text or ("有" in text and "吗" in text):
        return "有" if named(scene, text) else "没有"
    if "什么" in text or "哪" in text:
        item = only(scene, text)
        for word, name in (("颜色", "colour"), ("形状", "shape"), ("大小", "size")):
            if word in text:
                return item.size + "的" if name == "size" else getattr(item, name)
        return item.place
    if "大" in text and "小" in text:
        return only(scene, text).size + "的"
    subject, value = re.fullmatch("(?:请问)?(.+?)是(?:不是)?(.+?)吗?？", text).groups()
    item = only(scene, subject)
    truth = value.rstrip("的") in (item.colour, item.shape, item.size)
    return "是" if truth else "不是"


def test_questions_are_answered_rightly(asked):
    for scene, question in asked:
        assert answer(scene, question.text) == question.answer, (question, scene)
    for index in range(3000):
        rng = world.generator(12, index)
        scene = world.sample_scene(rng, "all")
        question = questions.ask(scene, rng, unseen=True)
        assert answer(scene, question.text) == question.answer, (question, scene)


def test_dialogues_refer_back_and_stay_right():
    back = 0
    for index in range(500):
        rng = world.generator(13, index)
        scene = world.sample_scene(rng)
        rounds = questions.dialogue(scene, rng)
        assert len(rounds) == 4
        assert sum("它" not in question.text for question in rounds) >= plan.SPOKEN_ROUNDS
        for former, question in zip([None, *rounds], rounds):
            text = question.text
            if "它" in text:
                back += 1
                assert former.subject == question.subject
                item = scene.objects[former.subject]
                text = text.replace("它", item.colour + item.shape)
                if question.kind == "place":
                    assert question.answer == item.place
                elif question.kind == "size":
                    assert question.answer == item.size + "的"
                else:
                    assert question.answer == getattr(item, question.kind)
            else:
                assert answer(scene, text) == question.answer
    assert back > 200


def test_blind_guesses_are_poor(asked):
    """Guesses that know the kind, then the whole text of the question, but not the picture."""
    kinds = collections.defaultdict(collections.Counter)
    for _, question in asked:
        kinds[question.kind][question.answer] += 1
    total = len(asked)
    assert sum(max(counter.values()) for counter in kinds.values()) / total < 0.33
    for kind in ("size", "existence", "yesno"):
        counter = kinds[kind]
        assert max(counter.values()) / sum(counter.values()) < 0.56
    for kind in ("colour", "shape", "place", "count", "comparison"):
        assert max(kinds[kind].values()) / sum(kinds[kind].values()) < 0.48
    known = collections.defaultdict(collections.Counter)
    for _, question in asked[:5000]:
        known[question.text][question.answer] += 1
    right = [
        bool(known[q.text]) and known[q.text].most_common(1)[0][0] == q.answer
        for _, q in asked[5000:]
    ]
    assert np.mean(right) < 0.4


def test_test_wordings_are_new_but_their_characters_are_not(asked):
    seen = {q.text for _, q in asked}
    fresh, letters = set(), set()
    for index in range(1500):
        rng = world.generator(14, index)
        scene = world.sample_scene(rng, "all")
        clip = motion.sample_clip(rng)
        fresh.add(questions.ask(scene, rng, unseen=True).text)
        letters.update(
            "".join(language.captions(scene, True) + language.video_captions(clip, True))
        )
        letters.update(questions.ask_clip(clip, rng, True).text)
        assert not set(language.captions(scene)) & set(language.captions(scene, True))
    assert not seen & fresh
    letters.update("".join(fresh))
    letters.update("".join(sum(instructions.UNSEEN_INSTRUCTIONS.values(), ())))
    read = set("".join(sum(instructions.INSTRUCTIONS.values(), ())))
    for example in text_examples(0, 3000):
        read.update(example.instruction + example.answer)
        read.update("".join(text for _, text in example.media))
    assert letters <= read and len(read) < 150


def test_text_stream_is_random_access_and_answerable():
    rows = list(text_examples(3, 400))
    assert rows[250] == text_example(3, 250) != text_example(4, 250)
    tasks = {"vqa", "caption", "dialogue", "asr", "spoken_vqa", "video_caption", "text"}
    assert {row.task for row in rows} == tasks
    for row in rows:
        media = dict(row.media)
        if row.task in ("vqa", "spoken_vqa") and "text:image" in media and "region" not in row.tags:
            objects = language.parse_objects(media["text:image"])
            scene = world.Scene(tuple(objects), "noise", 0)
            question = row.instruction or media["text:speech"] + "？"
            assert answer(scene, question) == row.answer
        if row.task == "caption":
            described = language.parse_objects(media["text:image"])
            assert language.parse_objects(row.answer) == described
        if row.task == "asr":
            assert row.answer == media["text:speech"] == row.transcript


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
def test_noise_has_the_asked_level_and_colour(kind):
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


def test_foreign_directories_are_refused(built, tmp_path):
    with pytest.raises(UserError, match="another seed"):
        build.build(built, SIZES, seed=1)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"no world\.json"):
        build.build(tmp_path, SIZES)
    assert (tmp_path / "notes.txt").read_text() == "mine"
