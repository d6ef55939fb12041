"""The world as text alone: what the mini LLM reads before it ever sees or hears.

An image slot holds a written description, a video slot written frames, a speech slot the written
sentence without punctuation. Their media entries are ('text:image', text), ('text:video', text)
and ('text:speech', text): the prompt puts the text between the tags where features go later.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping

import numpy as np

from xllm_jax.data.example import Example
from xllm_jax.data.synthetic_world import language, motion, questions, requests
from xllm_jax.data.synthetic_world.scene import (
    COLORS,
    PLACES,
    SHAPES,
    SIZES,
    Scene,
    choose,
    generator,
    sample_scene,
)
from xllm_jax.data.text import instructions_to_draw

# Kinds without a share here are for streams that ask for them.
SHARES = {
    "answer_scene": 0.44,
    "dialogue_scene": 0.09,
    "caption_scene": 0.06,
    "region_scene": 0.03,
    "caption_clip": 0.06,
    "answer_clip": 0.06,
    "repeat_speech": 0.07,
    "repeat_speech_scene": 0.04,
    "answer_speech": 0.14,
    "sentence": 0.01,
}
SLOT = 24  # most characters of a written request that stands in the speech slot
# What the LLM is asked about a written scene: more of what is hard to read than people ask.
KINDS = {
    "color": 0.16,
    "shape": 0.16,
    "place": 0.24,
    "size": 0.07,
    "count": 0.04,
    "existence": 0.13,
    "comparison": 0.12,
    "yesno": 0.08,
}
UNSEEN_SHARE = 0.25
# Of what the LLM is asked to repeat: characters in no order, so that it can repeat anything.
SCRAMBLED_SHARE = 0.3
SPOKEN = 16  # most characters of a sentence that is spoken


def text_example(
    seed: int,
    index: int,
    pairs: str = "all",
    shares: Mapping[str, float] = SHARES,
    spelled: float = 0.0,
    unnamed: float = 0.0,
    shuffled: float = 0.0,
) -> Example:
    """Example `index` of the endless text stream (random access, for data loaders).

    Args:
      seed: seed of the stream; use another one for validation.
      index: position in the stream.
      pairs: 'all' lets the language know every color and shape together, as a real LLM does; the
        held-out pairs are held out from pictures. 'seen' holds them out of the text too.
      shares: {kind of example, a key of MAKERS: how often, in relation to the others}.
      spelled: share of written sentences that stand in the slot character by character, with one
        more sign at the end, as CIF fires.
      unnamed: share of written clips whose frames are sentences without a frame's name, in order,
        as an interface gives them.
      shuffled: share of sentences to repeat that become words and characters in no order, so that
        nothing but the slot tells them.
    """
    rng = generator(seed, "text", index)
    weights = np.asarray(list(shares.values()))
    kind = str(rng.choice(list(shares), p=weights / weights.sum()))
    made = MAKERS[kind](rng, f"text-{seed}-{index}", pairs)
    # Last, so that the texts are the same with and without.
    if shuffled and made.task == "asr" and rng.random() < shuffled:
        made = _shuffle(made, rng)
    if spelled and rng.random() < spelled:
        made = dataclasses.replace(made, media=tuple(map(_spell, made.media)))
    if unnamed and rng.random() < unnamed:
        made = dataclasses.replace(made, media=tuple(map(_leave_names_out, made.media)))
    return made


def shuffled_words(rng: np.random.Generator, least: int = 2, most: int = 7) -> str:
    """`least` to `most` words and characters in no order, of SPOKEN characters at most: what is
    said there, nothing but the sound or the slot tells."""
    kinds = (spoken_words(), spoken_characters())
    count = int(rng.integers(least, most + 1))
    return "".join(str(rng.choice(list(kinds[rng.integers(2)]))) for _ in range(count))[:SPOKEN]


def _shuffle(made: Example, rng: np.random.Generator) -> Example:
    said = shuffled_words(rng)
    media = tuple((k, said if k == "text:speech" else words) for k, words in made.media)
    return dataclasses.replace(made, media=media, answer=said, transcript=said)


def _spell(medium: tuple[str, str]) -> tuple[str, str]:
    kind, words = medium
    return ("spelled:speech", f"{words}。") if kind == "text:speech" else medium


def _leave_names_out(medium: tuple[str, str]) -> tuple[str, str]:
    kind, words = medium
    if kind != "text:video":
        return medium
    for name in language.FRAME_NAMES:
        words = words.replace(f"，{name}", "。").replace(name, "")
    return kind, words


def text_examples(seed: int, count: int | None = None, pairs: str = "all") -> Iterator[Example]:
    """The first `count` examples of the stream, or all of its endless rest."""
    index = 0
    while count is None or index < count:
        yield text_example(seed, index, pairs)
        index += 1


def ask(scene: Scene, rng: np.random.Generator) -> questions.Question:
    """A question in any wording: like the held-out pairs, the wordings kept for tests are held out
    from pictures and sounds, not from what the LLM has read."""
    return questions.ask(scene, rng, unseen=rng.random() < UNSEEN_SHARE, mix=KINDS)


def sentence(rng: np.random.Generator, pairs: str = "all", unseen: bool = False) -> str:
    """One short sentence that a person may speak: a question, or words about one object."""
    scene = sample_scene(rng, pairs)
    if rng.random() < 0.55:
        return questions.ask(scene, rng, unseen).text
    return language.region(choose(rng, scene.objects), rng, unseen)


@functools.cache
def spoken_characters() -> str:
    """Every character that a transcript of the world may contain, in the order of their codes.

    Taken from the tables that `sentence` and the spoken rounds of dialogues are filled from.
    """
    rows = [text for kind, pair in questions.WORDINGS.items() if kind != "motion" for text in pair]
    texts = [text for row in (*rows, language.REGIONS, language.UNSEEN_REGIONS) for text in row]
    values = [*PLACES, *SIZES, *COLORS, *SHAPES, *questions.ANSWER_OF.values(), "的物体"]
    letters = set(language.spoken("".join([*values, *(re.sub("{.*?}", "", t) for t in texts)])))
    return "".join(sorted(letters))


@functools.cache
def spoken_words() -> tuple[str, ...]:
    """Words of the world that a transcript may contain, longer than a character."""
    told = [*PLACES, *COLORS, *SHAPES, *questions.ANSWER_OF.values(), "什么", "物体", "有没有"]
    asked = ["颜色", "形状", "位置", "大小", "哪里", "多少", "几个", "哪种", "请问", "图中"]
    return tuple(sorted({language.spoken(word) for word in (*told, *asked) if len(word) > 1}))


def describe(scene: Scene, rng: np.random.Generator) -> str:
    """A written scene that stands for a picture."""
    return language.caption(scene, rng)


def _answer_scene(rng, key, pairs):
    scene = sample_scene(rng, pairs)
    asked = ask(scene, rng)
    media = (("text:image", describe(scene, rng)),)
    return Example(key, media, asked.text, asked.answer, "vqa", tags=(asked.kind,))


def _dialogue_scene(rng, key, pairs):
    scene = sample_scene(rng, pairs)
    rounds = questions.dialogue(scene, rng, int(rng.integers(2, 5)))
    history = tuple((former.text, former.answer) for former in rounds[:-1])
    media = (("text:image", describe(scene, rng)),)
    last = rounds[-1]
    return Example(
        key, media, last.text, last.answer, "dialogue", history=history, tags=(last.kind,)
    )


def _caption_scene(rng, key, pairs):
    scene = sample_scene(rng, pairs)
    media = (("text:image", describe(scene, rng)),)
    return Example(key, media, answer=language.caption(scene, rng), task="caption")


def _region_scene(rng, key, pairs):
    scene = sample_scene(rng, pairs)
    item = choose(rng, scene.objects)
    instruction = f"请描述{item.place}的物体。"
    media = (("text:image", describe(scene, rng)),)
    return Example(key, media, instruction, language.region(item, rng), "vqa", tags=("region",))


def _written_clip(rng, pairs):
    unseen = pairs == "all" and rng.random() < 1 / 6
    clip = motion.sample_clip(rng, "unseen" if unseen else "seen")
    return clip, (("text:video", "，".join(language.written_frames(clip, rng)) + "。"),)


def _caption_clip(rng, key, pairs):
    clip, media = _written_clip(rng, pairs)
    return Example(key, media, answer=language.video_caption(clip, rng), task="video_caption")


def _answer_clip(rng, key, pairs):
    clip, media = _written_clip(rng, pairs)
    asked = questions.ask_clip(clip, rng)
    return Example(key, media, asked.text, asked.answer, "vqa", tags=(asked.kind,))


def _said(rng, pairs):
    """Words to repeat: a sentence in any wording, or characters in no order."""
    if rng.random() >= SCRAMBLED_SHARE:
        return language.spoken(sentence(rng, pairs, unseen=rng.random() < UNSEEN_SHARE))
    count = int(rng.integers(3, 17))
    return "".join(rng.choice(list(spoken_characters()), count))


def _repeat_speech(rng, key, pairs):
    said = _said(rng, pairs)
    return Example(key, (("text:speech", said),), answer=said, task="asr", transcript=said)


def _repeat_speech_scene(rng, key, pairs):
    said = _said(rng, pairs)
    media = (("text:image", describe(sample_scene(rng, pairs), rng)), ("text:speech", said))
    return Example(key, media, answer=said, task="asr", transcript=said)


def _answer_speech(rng, key, pairs):
    scene = sample_scene(rng, pairs)
    asked = ask(scene, rng)
    said = language.spoken(asked.text)
    media = (("text:image", describe(scene, rng)), ("text:speech", said))
    return Example(key, media, "", asked.answer, "spoken_vqa", transcript=said, tags=(asked.kind,))


def _request(rng, pairs):
    """A request to draw in any wording, as in `ask`."""
    return requests.sample_request(rng, pairs, unseen_wording=rng.random() < UNSEEN_SHARE)


def _draw(rng, key, pairs):
    asked = _request(rng, pairs)
    words = choose(rng, instructions_to_draw.WORDINGS["zh"].requests)
    instruction = words.replace(instructions_to_draw.CAPTION, asked.said)
    return Example(key, (), instruction, requests.caption(asked), "draw", tags=(asked.kind,))


def _draw_speech(rng, key, pairs):
    asked = _request(rng, pairs)
    while len(said := language.spoken(asked.said)) >= SLOT:
        asked = _request(rng, pairs)
    media = (("text:speech", said),)
    return Example(key, media, "画<speech>", requests.caption(asked), "draw", transcript=said)


def _draw_edit(rng, key, pairs):
    scene = sample_scene(rng, pairs)
    color = choose(rng, COLORS)
    media = (("text:image", describe(scene, rng)),)
    instruction = choose(rng, requests.EDITS).replace(requests.COLOR, color)
    asked = requests.recolored(scene, color)
    return Example(key, media, instruction, requests.caption(asked), "draw", tags=(asked.kind,))


def _sentence(rng, key, pairs):
    return Example(key, answer=sentence(rng, pairs), task="text")


MAKERS = {
    "answer_scene": _answer_scene,
    "dialogue_scene": _dialogue_scene,
    "caption_scene": _caption_scene,
    "region_scene": _region_scene,
    "caption_clip": _caption_clip,
    "answer_clip": _answer_clip,
    "repeat_speech": _repeat_speech,
    "repeat_speech_scene": _repeat_speech_scene,
    "answer_speech": _answer_speech,
    "draw": _draw,
    "draw_speech": _draw_speech,
    "draw_edit": _draw_edit,
    "sentence": _sentence,
}
