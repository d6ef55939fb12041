"""The English of the world's sentences names what the scene holds."""

from __future__ import annotations

import re

import numpy as np
import pytest

from xllm_jax.data.synthetic_world import (
    english,
    language,
    motion,
    questions,
    scene,
    text_stream,
)
from xllm_jax.data.text.instructions import instructions

# Written by hand, apart from the table that is tested.
COLORS = dict(zip(scene.COLORS, ("red", "green", "blue", "yellow", "purple", "white")))
SHAPES = dict(zip(scene.SHAPES, ("circle", "square", "triangle", "star", "cross")))
SIZES = {"大": "big", "小": "small"}
HAN = re.compile("[\u3400-\u9fff]")


def told(text: str) -> list[str]:
    """Colors, shapes and sizes that an English text names, in its order."""
    words = [*COLORS.values(), *SHAPES.values(), *SIZES.values()]
    return re.findall(rf"\b({'|'.join(words)})\b", text)


def drawn(seed: int) -> scene.Scene:
    return scene.sample_scene(np.random.default_rng(seed), "all")


@pytest.mark.parametrize("unseen", [False, True])
def test_captions_and_regions_name_their_objects(unseen):
    for seed in range(100):
        one = drawn(seed)
        expected = [
            w for o in one.objects for w in (SIZES[o.size], COLORS[o.color], SHAPES[o.shape])
        ]
        for text in language.captions(one, unseen):
            gloss = english.gloss(text)
            assert not HAN.search(gloss) and told(gloss) == expected, text
        gloss = english.gloss(language.region(one.objects[0], np.random.default_rng(seed), unseen))
        assert not HAN.search(gloss) and told(gloss) == expected[:3]


MEANINGS = {
    "color": "What color is",
    "shape": "What shape is",
    "place": "Where is",
    "size": "big or small?",
    "count": "How many objects are there?",
    "existence": "Is there a",
    "comparison": "(Which is bigger|have the same)",
    "yesno": "^Is (the|it)",
}


@pytest.mark.parametrize("unseen", [False, True])
def test_questions_mean_what_their_kind_asks(unseen):
    for seed in range(400):
        rng = np.random.default_rng(seed)
        asked = questions.ask(drawn(seed), rng, unseen)
        for text in (asked.text, language.spoken(asked.text)):
            gloss = english.gloss(text)
            assert re.search(MEANINGS[asked.kind], gloss), (text, gloss)
            assert not HAN.search(gloss), text
            named = [COLORS.get(w) or SHAPES.get(w) for w in re.findall(PAIRS, asked.text)]
            assert all(name in told(gloss) for name in named), (text, gloss)
        answer = english.gloss(asked.answer)
        assert answer and not HAN.search(answer)


PAIRS = "|".join([*scene.COLORS, *scene.SHAPES])


def test_clips_and_instructions():
    for seed in range(60):
        rng = np.random.default_rng(seed)
        clip = motion.sample_clip(rng, "all")
        for unseen in (False, True):
            texts = [
                *language.video_captions(clip, unseen),
                questions.ask_clip(clip, rng, unseen).text,
            ]
            texts += language.written_frames(clip, rng)
            assert not HAN.search(" ".join(map(english.gloss, texts)))
            assert SHAPES[clip.shape] in english.gloss(texts[0])
    for task in english.INSTRUCTIONS:
        assert all(english.gloss(text) == english.INSTRUCTIONS[task] for text in instructions(task))
    assert english.INSTRUCTIONS.keys() >= {"caption", "asr", "spoken_vqa", "video_caption"}


def test_requests_to_draw_are_read_to_the_last_word():
    request = "画一个绿色方形和一个小的黄色星形"
    assert english.gloss(request) == "draw: one green square and one small yellow star"
    assert english.gloss("画一张一样的图，但是蓝色的") == "draw the same picture, but blue"
    for seed in range(100):
        shares = {"draw": 1.0, "draw_edit": 1.0}
        asked = text_stream.text_example(5, seed, shares=shares)
        for text in (asked.instruction, asked.answer):
            meaning = english.gloss(text)
            assert meaning and not HAN.search(meaning), (text, meaning)


@pytest.mark.parametrize(
    "text", ["", "red circle", "今天天气很好，我们去公园吧。", "<script>", "？"]
)
def test_other_texts_have_no_gloss(text):
    assert english.gloss(text) == ""


def test_what_a_model_makes_up_is_read_word_by_word():
    assert english.gloss("有大的白色物体在哪里") == "there is big white object at where"
    assert "色" in english.gloss("有大的白色物体色")
