"""What the world says, asks and answers, checked against its scenes by independent code."""

import collections
import dataclasses
import re

import numpy as np
import pytest

from xllm_jax.data.synthetic_world import language, motion, plan, questions
from xllm_jax.data.synthetic_world import scene as world
from xllm_jax.data.synthetic_world.text_stream import (
    SLOT,
    spoken_characters,
    text_example,
    text_examples,
)
from xllm_jax.data.text import instructions


@pytest.fixture(scope="module")
def asked():
    """(scene, question) pairs in training's wordings."""
    pairs = []
    for index in range(6000):
        rng = world.generator(11, "asked", index)
        scene = world.sample_scene(rng)
        pairs.append((scene, questions.ask(scene, rng)))
    return pairs


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
        ("color", world.COLORS),
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
        phrases = words_in(text, world.SHAPES) or words_in(text, world.COLORS)
        first, second = (only(scene, phrase) for phrase in phrases)
        assert first.size != second.size
        return phrases[0] if first.size == "大" else phrases[1]
    if "有没有" in text or ("有" in text and "吗" in text):
        return "有" if named(scene, text) else "没有"
    if "什么" in text or "哪" in text:
        item = only(scene, text)
        for word, name in (("颜色", "color"), ("形状", "shape"), ("大小", "size")):
            if word in text:
                return item.size + "的" if name == "size" else getattr(item, name)
        return item.place
    if "多大" in text or ("大" in text and "小" in text):
        return only(scene, text).size + "的"
    subject, value = re.fullmatch("(?:请问)?(.+?)是(?:不是)?(.+?)吗?？", text).groups()
    item = only(scene, subject)
    truth = value.rstrip("的") in (item.color, item.shape, item.size)
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
                text = text.replace("它", item.color + item.shape)
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
    for kind in ("color", "shape", "place", "count", "comparison"):
        assert max(kinds[kind].values()) / sum(kinds[kind].values()) < 0.48
    known = collections.defaultdict(collections.Counter)
    for _, question in asked[:5000]:
        known[question.text][question.answer] += 1
    right = [
        bool(known[q.text]) and known[q.text].most_common(1)[0][0] == q.answer
        for _, q in asked[5000:]
    ]
    assert np.mean(right) < 0.4


@pytest.mark.parametrize("mix", ("pictures", "dialogues", "spoken", "clips"))
def test_the_best_guess_from_training_is_poor(mix):
    """As above for each mix of the data: learnt from the training split, tried on the test split.

    Guesses the most frequent answer of all, of the kind of question, and of the whole question.
    """
    sizes = dataclasses.replace(plan.WorldSizes(), train_images=1200, test_images=400)
    train, test = (rounds(plan.plan_split(0, name, sizes), mix) for name in ("train", "test"))
    for view in (lambda asked: "", lambda asked: asked.kind, lambda asked: asked.text):
        known = collections.defaultdict(collections.Counter)
        for asked in train:
            known[view(asked)][asked.answer] += 1
        best = {key: counter.most_common(1)[0][0] for key, counter in known.items()}
        right = [best.get(view(asked)) == asked.answer for asked in test]
        assert len(right) >= 150 and np.mean(right) < 0.45


def rounds(split, mix):
    """Every question of one mix."""
    if mix == "pictures":
        return [asked for picture in split.pictures for asked in picture.questions]
    if mix == "clips":
        return [
            questions.ask_clip(video.clip, world.generator(16, number), split.name == "test")
            for number, video in enumerate(split.videos)
        ]
    return [
        asked
        for talk in split.dialogues
        for asked, voice in zip(talk.rounds, talk.voices)
        if voice or mix == "dialogues"
    ]


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


def test_text_streams_of_requests_say_what_is_to_be_drawn():
    shares = {"draw": 1.0, "draw_speech": 1.0, "draw_edit": 1.0}
    rows = [text_example(3, index, shares=shares) for index in range(300)]
    assert {row.task for row in rows} == {"draw"} and not any(row.outputs for row in rows)
    for row in rows:
        media, told = dict(row.media), language.parse_objects(row.answer)
        if "text:image" in media:
            (color,) = {item.color for item in told}
            shown = language.parse_objects(media["text:image"])
            assert told == {dataclasses.replace(item, color=color) for item in shown}
            assert color in row.instruction
            continue
        asked = media.get("text:speech", row.instruction)
        for values in (world.COLORS, world.SHAPES):
            written = {one for one in values if one in asked}
            assert written == {one for one in values if one in row.answer}
        if "text:speech" in media:
            assert row.instruction == "画<speech>" and asked == row.transcript
            assert len(asked) < SLOT and language.spoken(asked) == asked
    kinds = collections.Counter(next(iter(dict(row.media)), "") for row in rows)
    assert min(kinds.values()) > 70 and len(kinds) == 3


def test_listed_characters_are_those_of_transcripts():
    heard = set()
    for split in plan.SPLITS:
        made = plan.plan_split(5, split, plan.WorldSizes().scaled(0.4))
        heard.update("".join(utterance.text for utterance in made.utterances))
        for talk in made.dialogues:
            said = [q.text for q, voice in zip(talk.rounds, talk.voices) if voice]
            heard.update(language.spoken("".join(said)))
    assert heard == set(spoken_characters())


def test_clip_facts_score_captions():
    for index in range(100):
        rng = world.generator(15, index)
        clip = motion.sample_clip(rng, motion=motion.MOTIONS[index % len(motion.MOTIONS)])
        for text in language.video_captions(clip, unseen=bool(index % 2)):
            facts = language.clip_facts(*language.parse_motion(text))
            assert facts[:2] == (f"object:{clip.color}{clip.shape}", f"motion:{clip.motion}")
            changed = (f"becomes:{clip.to_color}",) if clip.motion == "变色" else ()
            assert facts[2:] == changed
