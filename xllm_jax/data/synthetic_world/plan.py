"""What a world of given sizes holds, before any file is written.

The composition of the test split is fixed here. Half of its scenes and clips contain a held-out
(shape, color) pair, half of its utterances have the unseen voice, a quarter has wordings that
training never uses; the three are crossed, and each record's tags say what applies. Every second
training utterance is a list of words.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from xllm_jax.data.synthetic_world import language, motion, questions, speak
from xllm_jax.data.synthetic_world.scene import HELD_OUT, Scene, generator, sample_scene
from xllm_jax.data.synthetic_world.text_stream import sentence, shuffled_words

SPLITS = ("train", "val", "test")
FIRST_ID = {"train": 1, "val": 500001, "test": 900001}
ROUNDS, SPOKEN_ROUNDS = 4, 2
# One training utterance in so many is a list of words, as speech corpora have them: from a few
# wordings alone, networks learn these by heart and hear them in every other wording.
WORD_LISTS = 2


@dataclasses.dataclass(frozen=True)
class WorldSizes:
    """How many of everything; dialogues are about the first images of their split."""

    train_images: int = 4000
    train_dialogues: int = 800
    train_utterances: int = 3200
    train_videos: int = 1400
    train_instructions: int = 6000
    val_images: int = 60
    val_dialogues: int = 30
    val_utterances: int = 60
    val_videos: int = 30
    val_instructions: int = 30
    test_images: int = 300
    test_dialogues: int = 150
    test_utterances: int = 300
    test_videos: int = 150
    test_instructions: int = 150

    def scaled(self, share: float) -> WorldSizes:
        """All sizes times `share`, at least 4 each."""
        fields = dataclasses.asdict(self)
        return WorldSizes(**{name: max(4, round(size * share)) for name, size in fields.items()})

    def of(self, split: str, what: str) -> int:
        """The size of one part of one split."""
        return getattr(self, f"{split}_{what}")


@dataclasses.dataclass(frozen=True)
class Picture:
    """One image with its captions (the first is the answer) and written questions."""

    image_id: int
    file_name: str
    scene: Scene
    captions: tuple[str, ...]
    regions: tuple[str, ...]
    questions: tuple[questions.Question, ...]
    tags: tuple[str, ...]
    caption_tags: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Dialogue:
    """Rounds about one picture; `voices[i]` is None where round i is written only."""

    picture: Picture
    rounds: tuple[questions.Question, ...]
    voices: tuple[speak.Voice | None, ...]


@dataclasses.dataclass(frozen=True)
class Utterance:
    """One spoken sentence, `text` as its transcript has it."""

    name: str
    text: str
    voice: speak.Voice
    tags: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Video:
    """One clip with its captions (the first is the answer)."""

    number: int
    clip: motion.Clip
    captions: tuple[str, ...]
    tags: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Split:
    """All of one split."""

    name: str
    pictures: tuple[Picture, ...]
    dialogues: tuple[Dialogue, ...]
    utterances: tuple[Utterance, ...]
    videos: tuple[Video, ...]


def plan_split(seed: int, split: str, sizes: WorldSizes) -> Split:
    """Everything of one split; the same for the same arguments, item by item."""
    pictures = tuple(picture(seed, split, i) for i in range(sizes.of(split, "images")))
    talks = min(len(pictures), sizes.of(split, "dialogues"))
    return Split(
        split,
        pictures,
        tuple(dialogue(seed, split, i, pictures[i]) for i in range(talks)),
        tuple(utterance(seed, split, i) for i in range(sizes.of(split, "utterances"))),
        tuple(video(seed, split, i) for i in range(sizes.of(split, "videos"))),
    )


def unseen_pair(split: str, index: int) -> bool:
    """Whether test item `index` shows a held-out pair: every second one."""
    return split == "test" and index % 2 == 1


def unseen_wording(split: str, index: int) -> bool:
    """Whether test item `index` uses test-only wordings: two of eight in a row."""
    return split == "test" and index // 2 % 4 == 0


def scene(seed: int, split: str, index: int) -> Scene:
    """What image `index` of a split shows."""
    return _scene(generator(seed, "picture", split, index), split, index)


def _scene(rng: np.random.Generator, split: str, index: int) -> Scene:
    return sample_scene(rng, "unseen" if unseen_pair(split, index) else "seen")


def picture(seed: int, split: str, index: int) -> Picture:
    """Image `index` of a split with all that is written about it."""
    rng = generator(seed, "picture", split, index)
    scene = _scene(rng, split, index)
    unseen = unseen_wording(split, index)
    image_id = FIRST_ID[split] + index
    suffix = "png" if index % 10 == 9 else "jpg"
    captions = language.captions(scene)
    order = [captions[int(i)] for i in rng.permutation(len(captions))]
    if split == "train":
        order = order[:3]
    if unseen:
        order = language.captions(scene, unseen=True) + order
    tags = ("unseen_pair",) * scene.unseen
    return Picture(
        image_id,
        f"{image_id:012d}.{suffix}",
        scene,
        tuple(order),
        tuple(language.region(item, rng, unseen) for item in scene.objects),
        tuple(questions.ask_several(scene, rng, 3, unseen)),
        tags,
        tags + ("unseen_wording",) * unseen,
    )


def question_tags(question: questions.Question, scene: Scene) -> tuple[str, ...]:
    """The tags of one question: its kind, its wording, and which pairs scene and subject have."""
    subject = question.subject >= 0 and scene.objects[question.subject]
    asked = bool(subject) and Scene((subject,), scene.background, 0).unseen
    return (
        (question.kind,)
        + ("unseen_wording",) * question.unseen
        + ("unseen_pair",) * scene.unseen
        + ("asks_unseen_pair",) * asked
    )


def dialogue(seed: int, split: str, index: int, about: Picture) -> Dialogue:
    """The dialogue about one picture; its first rounds that stand alone are spoken."""
    rng = generator(seed, "dialogue", split, index)
    rounds = questions.dialogue(about.scene, rng, ROUNDS, unseen_wording(split, index))
    voices: list[speak.Voice | None] = [None] * len(rounds)
    alone = [i for i, question in enumerate(rounds) if "它" not in question.text]
    for count, i in enumerate(alone[:SPOKEN_ROUNDS]):
        voices[i] = speak.sample_voice(rng, unseen=split == "test" and count % 2 == 1)
    return Dialogue(about, tuple(rounds), tuple(voices))


def utterance(seed: int, split: str, index: int) -> Utterance:
    """Sentence `index` of the speech corpus."""
    rng = generator(seed, "utterance", split, index)
    unseen_voice, unseen = split == "test" and index % 2 == 1, unseen_wording(split, index)
    voice = speak.sample_voice(rng, unseen_voice)
    if split == "train" and index % WORD_LISTS == 0:
        text = word_list(rng)
    else:
        text = sentence(rng, "all" if split == "test" else "seen", unseen)
    name = f"BAC009{voice.speaker}W{FIRST_ID[split] + index:07d}"
    tags = ("unseen_voice",) * unseen_voice + ("unseen_wording",) * unseen
    return Utterance(name, language.spoken(text), voice, tags)


def word_list(rng: np.random.Generator) -> str:
    """Four to nine words and characters in no order; no held-out pair is among them."""
    while True:
        text = shuffled_words(rng, 4, 9)
        if not any(color + shape in text for shape, color in HELD_OUT):
            return text


def video(seed: int, split: str, index: int) -> Video:
    """Clip `index` of a split."""
    rng = generator(seed, "video", split, index)
    # Motions take turns, so that every split has each of them equally often.
    name = motion.MOTIONS[index // 2 % len(motion.MOTIONS)]
    clip = motion.sample_clip(rng, "unseen" if unseen_pair(split, index) else "seen", name)
    unseen = unseen_wording(split, index)
    captions = language.video_captions(clip)
    order = [captions[int(i)] for i in rng.permutation(len(captions))]
    if unseen:
        order = language.video_captions(clip, unseen=True) + order
    facts = language.clip_facts(clip.shape, clip.color, clip.to_color, clip.motion)
    tags = facts + ("unseen_pair",) * clip.unseen + ("unseen_wording",) * unseen
    return Video(FIRST_ID[split] - 1 + index, clip, tuple(order), tags)
