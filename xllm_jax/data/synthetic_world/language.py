"""Everything the world says about scenes and clips, apart from questions (see questions.py).

Pure functions from ground truth to Chinese text. Each list of wordings has a part that is used only
in the test split, told apart by `unseen=True`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from xllm_jax.data.synthetic_world import motion
from xllm_jax.data.synthetic_world.scene import (
    COLORS,
    PLACES,
    SHAPES,
    SIZES,
    Object,
    Scene,
    choose,
)

NUMBERS = {1: "一个", 2: "两个", 3: "三个"}
FRAME_NAMES = ("第一帧", "第二帧", "第三帧", "第四帧")

# (sentence, one object's phrase); {objects} is the joined phrases, {count} their number.
CAPTIONS = (
    ("图中{objects}。", "{place}有一个{look}"),
    ("{objects}。", "{place}是一个{look}"),
    ("图中有{count}物体，{objects}。", "{place}是{look}"),
    ("图中有{objects}。", "一个{look}在{place}"),
    ("{objects}。", "{place}有{look}"),
    ("这张图的{objects}。", "{place}是{look}"),
)
UNSEEN_CAPTIONS = (
    ("这里有{objects}。", "{place}的一个{look}"),
    ("图中一共有{count}物体，{objects}。", "一个{look}在{place}"),
)

REGIONS = (
    "{place}有一个{look}。",
    "一个{look}在{place}。",
    "{place}是{look}。",
    "{look}在{place}。",
    "图中{place}有{look}。",
    "这里的{look}在{place}。",
    "{place}的物体是{look}。",
    "有{look}在{place}。",
)
UNSEEN_REGIONS = ("图中的{place}是一个{look}。", "有一个{look}在图中{place}。")

VIDEO_CAPTIONS = ("一个{pair}{motion}。", "视频中有一个{pair}{motion}。", "{pair}{motion}。")
UNSEEN_VIDEO_CAPTIONS = ("视频中一个{pair}在{motion}。", "这个视频中{pair}{motion}。")

_OBJECT = (
    f"(?P<size>[{''.join(SIZES)}])的(?P<color>{'|'.join(COLORS)})(?P<shape>{'|'.join(SHAPES)})"
)
_PLACE = f"(?P<place>{'|'.join(PLACES)})"
_PHRASES = (
    re.compile(f"{_PLACE}[有是的一个物体]*{_OBJECT}"),
    re.compile(f"{_OBJECT}在(图中)?{_PLACE}"),
)


def spoken(text: str) -> str:
    """The text without punctuation, as transcripts of speech have it."""
    return re.sub("[，。？]", "", text)


def look(item: Object) -> str:
    """Size, color and shape, such as 大的红色圆形."""
    return f"{item.size}的{item.color}{item.shape}"


def wordings(seen: tuple, unseen_only: tuple, unseen: bool) -> tuple:
    """The wordings of one split: those for training, or those kept for the test."""
    return unseen_only if unseen else seen


def captions(scene: Scene, unseen: bool = False) -> list[str]:
    """Every full caption of a scene, one per wording; all objects in reading order."""
    return [_caption(scene.objects, *row) for row in wordings(CAPTIONS, UNSEEN_CAPTIONS, unseen)]


def caption(scene: Scene, rng: np.random.Generator, unseen: bool = False) -> str:
    """One full caption in a random wording."""
    return choose(rng, captions(scene, unseen))


def _caption(objects: tuple[Object, ...], sentence: str, phrase: str) -> str:
    phrases = [phrase.format(place=item.place, look=look(item)) for item in objects]
    return sentence.format(objects="，".join(phrases), count=NUMBERS[len(objects)])


def inventory(objects: Sequence[Object]) -> str:
    """All objects, each with its place, size and color, in one wording: 左边有大的红色圆形，…"""
    phrases = [f"{item.place}有{look(item)}" for item in objects]
    return "，".join(phrases)


def region(item: Object, rng: np.random.Generator, unseen: bool = False) -> str:
    """One sentence about one object."""
    row = choose(rng, wordings(REGIONS, UNSEEN_REGIONS, unseen))
    return row.format(place=item.place, look=look(item))


def motion_words(clip: motion.Clip) -> str:
    """What happens in a clip: 向左移动, …, or 从红色变成蓝色."""
    if clip.motion == "变色":
        return f"从{clip.color}变成{clip.to_color}"
    return clip.motion


def video_captions(clip: motion.Clip, unseen: bool = False) -> list[str]:
    """Every caption of a clip, one per wording."""
    rows = wordings(VIDEO_CAPTIONS, UNSEEN_VIDEO_CAPTIONS, unseen)
    # 从红色变成蓝色 already names the first color.
    pair = clip.shape if clip.motion == "变色" else clip.color + clip.shape
    return [row.format(pair=pair, motion=motion_words(clip)) for row in rows]


def video_caption(clip: motion.Clip, rng: np.random.Generator, unseen: bool = False) -> str:
    """One caption of a clip in a random wording."""
    return choose(rng, video_captions(clip, unseen))


def written_frames(clip: motion.Clip, rng: np.random.Generator) -> list[str]:
    """Four sentences that stand for the frames at the centers of four equal parts of a clip."""
    phrase = choose(rng, ("{place}有一个{look}", "{place}是一个{look}", "{place}有{look}"))
    sentences = []
    for index in range(4):
        item = motion.seen_object(clip, (index + 0.5) / 4)
        words = phrase.format(place=item.place, look=look(item)) if item else "没有物体"
        sentences.append(FRAME_NAMES[index] + words)
    return sentences


def parse_objects(text: str) -> frozenset[Object]:
    """The objects that a caption or region claims, whatever its wording; for exact scoring."""
    found = set()
    for clause in re.split("[，。]", text):
        for pattern in _PHRASES:
            match = pattern.search(clause)
            if match:
                fields = match.groupdict()
                found.add(Object(**{name: fields[name] for name in fields}))
                break
    return frozenset(found)


def clip_facts(shape: str, color: str, to_color: str, name: str) -> tuple[str, ...]:
    """A clip's facts as tags: object:红色圆形, motion:变色 and, if it changes, becomes:蓝色.

    Of a generated caption, `clip_facts(*parse_motion(caption))` compares with an example's tags.
    """
    changed = (f"becomes:{to_color}",) if name == "变色" else ()
    return (f"object:{color}{shape}", f"motion:{name}", *changed)


def parse_motion(text: str) -> tuple[str, str, str, str] | None:
    """(shape, color, second color, motion) that a video caption claims, None if unreadable."""
    shape = re.search("|".join(SHAPES), text)
    colors = re.findall("|".join(COLORS), text)
    named = [name for name in motion.MOTIONS if name in text]
    if "变成" in text and len(colors) == 2:
        named = ["变色"]
    if not shape or not colors or len(named) != 1:
        return None
    return shape.group(), colors[0], colors[-1], named[0]
