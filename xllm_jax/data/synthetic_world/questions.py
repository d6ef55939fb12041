"""Questions with short answers, and dialogues, about scenes and clips.

Each kind of question is one small function (scene, rng, rule) -> Question or None (the scene has no
such question). Yes/no-like kinds draw the truth first, then the words, so that knowing the question
alone does not help.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from xllm_jax.data.synthetic_world import motion
from xllm_jax.data.synthetic_world.language import NUMBERS, motion_words
from xllm_jax.data.synthetic_world.scene import (
    ALL_PAIRS,
    COLORS,
    PLACES,
    SEEN_PAIRS,
    SHAPES,
    SIZES,
    Object,
    Scene,
    choose,
)

# How often each kind is tried. Kinds with two answers stay rare: the blind guess must stay low.
# Comparisons fit few scenes, so they are tried twice as often as they should come out.
MIX = {
    "color": 0.22,
    "shape": 0.20,
    "place": 0.20,
    "size": 0.08,
    "count": 0.10,
    "existence": 0.08,
    "comparison": 0.13,
    "yesno": 0.06,
}
# {x} names one object, {a} and {b} two, {v} a value; the second tuple is for the test only.
WORDINGS = {
    "color": (
        (
            "{x}是什么颜色？",
            "{x}的颜色是什么？",
            "{x}是哪种颜色？",
            "请问{x}是什么颜色？",
            "{x}有哪种颜色？",
            "哪种颜色是{x}的颜色？",
        ),
        ("请问{x}有什么颜色？", "什么是{x}的颜色？"),
    ),
    "shape": (
        (
            "{x}是什么形状？",
            "{x}的形状是什么？",
            "{x}是哪种形状？",
            "请问{x}是什么形状？",
            "{x}有哪种形状？",
            "哪种形状是{x}的形状？",
        ),
        ("请问{x}有什么形状？", "什么是{x}的形状？"),
    ),
    "place": (
        (
            "{x}在哪里？",
            "{x}在什么位置？",
            "{x}的位置是哪里？",
            "请问{x}在哪里？",
            "图中什么位置有{x}？",
            "什么位置是{x}？",
        ),
        ("请问{x}在图中哪里？", "哪里有{x}？"),
    ),
    "size": (
        (
            "{x}是大的还是小的？",
            "{x}是大还是小？",
            "请问{x}是大是小？",
            "{x}有多大？",
            "请问{x}的大小？",
        ),
        ("{x}的大小是什么？", "请问{x}大还是小？"),
    ),
    "count": (
        (
            "图中有几个物体？",
            "一共有几个物体？",
            "有多少个物体？",
            "请问有几个物体？",
            "物体一共有多少？",
        ),
        ("物体有几个？", "图中一共有多少物体？"),
    ),
    "existence": (
        (
            "图中有{v}吗？",
            "有没有{v}？",
            "图中有没有{v}？",
            "请问图中有{v}吗？",
            "{v}有没有？",
        ),
        ("这里有{v}吗？", "请问有没有{v}？"),
    ),
    "bigger": (
        (
            "{a}和{b}哪个更大？",
            "{a}还是{b}更大？",
            "请问更大的是{a}还是{b}？",
        ),
        ("哪个更大，{a}还是{b}？",),
    ),
    "same": (
        (
            "{a}和{b}的{v}一样吗？",
            "{a}和{b}{v}一样吗？",
            "请问{a}的{v}和{b}一样吗？",
        ),
        ("{v}一样吗，{a}和{b}？",),
    ),
    "yesno": (
        ("{x}是{v}吗？", "{x}是不是{v}？", "请问{x}是不是{v}？"),
        ("请问{x}是{v}吗？",),
    ),
    "motion": (
        ("物体怎么了？", "视频中的物体怎么了？"),
        ("请问物体怎么了？",),
    ),
}
ANSWER_OF = {"color": "颜色", "shape": "形状", "size": "大小"}
VALUES = {"color": COLORS, "shape": SHAPES, "size": SIZES, "place": PLACES}


@dataclasses.dataclass(frozen=True)
class Question:
    """A question and its only right answer.

    Attributes:
      kind: a key of MIX, or 'motion'.
      text: the question; `answer`: the short answer.
      subject: index of the one object it is about, -1 if about none or several.
      told: attributes of the subject that question and answer give away.
      unseen: whether the wording is kept for the test.
    """

    kind: str
    text: str
    answer: str
    subject: int = -1
    told: frozenset[str] = frozenset()
    unseen: bool = False


@dataclasses.dataclass(frozen=True)
class Rule:
    """How to ask: with test-only wordings, about which pairs, and naming the object how (or 它)."""

    unseen: bool = False
    pairs: tuple = SEEN_PAIRS
    subject: int = -1
    known: frozenset[str] = frozenset()


def word(rng: np.random.Generator, row: str, unseen: bool, **fields: str) -> str:
    """One wording of a row of WORDINGS, filled in."""
    return choose(rng, WORDINGS[row][unseen]).format(**fields)


def names(scene: Scene, index: int, hidden: str) -> list[tuple[str, frozenset[str]]]:
    """Unambiguous names of one object that do not tell `hidden`, with what each tells."""
    item, others = scene.objects[index], scene.objects[:index] + scene.objects[index + 1 :]
    found = []
    if hidden != "place":
        found.append((f"{item.place}的物体", frozenset({"place"})))
    if hidden != "shape" and all(other.shape != item.shape for other in others):
        found.append((item.shape, frozenset({"shape"})))
    if hidden != "color" and all(other.color != item.color for other in others):
        found.append((f"{item.color}物体", frozenset({"color"})))
    if hidden not in ("shape", "color"):
        found.append((item.color + item.shape, frozenset({"shape", "color"})))
    return found


def pick_subject(scene: Scene, rng, rule: Rule, hidden: str):
    """(index, name, told) of an object to ask about, None if nothing fits."""
    if rule.subject >= 0:
        return None if hidden in rule.known else (rule.subject, "它", rule.known)
    index = int(rng.integers(len(scene.objects)))
    options = names(scene, index, hidden)
    return (index, *choose(rng, options)) if options else None


def ask_attribute(kind: str):
    """The maker of questions for one attribute of one object: color, shape, place or size."""

    def make(scene: Scene, rng, rule: Rule) -> Question | None:
        picked = pick_subject(scene, rng, rule, kind)
        if picked is None:
            return None
        index, name, told = picked
        value = getattr(scene.objects[index], kind)
        answer = f"{value}的" if kind == "size" else value
        text = word(rng, kind, rule.unseen, x=name)
        return Question(kind, text, answer, index, told | {kind}, rule.unseen)

    return make


def ask_count(scene: Scene, rng, rule: Rule) -> Question | None:
    """How many objects there are."""
    text = word(rng, "count", rule.unseen)
    return Question("count", text, NUMBERS[len(scene.objects)], unseen=rule.unseen)


def ask_existence(scene: Scene, rng, rule: Rule) -> Question | None:
    """Whether a shape, a color or a colored shape is there; half of them are."""
    form, truth = choose(rng, ("pair", "color", "shape")), bool(rng.integers(2))
    view = {
        "pair": (lambda pair: pair, "{1}{0}"),
        "color": (lambda pair: pair[1], "{0}物体"),
        "shape": (lambda pair: pair[0], "{0}"),
    }
    key, phrase = view[form]
    here = {key(item.pair) for item in scene.objects}
    pool = sorted({key(pair) for pair in rule.pairs} - here)
    value = choose(rng, sorted(here)) if truth else choose(rng, pool)
    filled = phrase.format(*value) if form == "pair" else phrase.format(value)
    text = word(rng, "existence", rule.unseen, v=filled)
    return Question("existence", text, "有" if truth else "没有", unseen=rule.unseen)


def ask_comparison(scene: Scene, rng, rule: Rule) -> Question | None:
    """Which of two objects is bigger, or whether two objects share an attribute."""
    if len(scene.objects) < 2:
        return None
    first, second = (scene.objects[i] for i in rng.permutation(len(scene.objects))[:2])
    if rng.integers(2):
        return _ask_bigger(scene, rng, rule, first, second)
    kind = choose(rng, ("color", "shape", "size"))
    same = getattr(first, kind) == getattr(second, kind)
    # Different values are more common than equal ones: keep only some, so that halves are equal.
    share = {"color": 0.42, "shape": 0.62, "size": 1.0}[kind]
    if not same and rng.random() > share:
        return None
    fields = {"a": first.place, "b": second.place, "v": ANSWER_OF[kind]}
    text = word(rng, "same", rule.unseen, **fields)
    return Question("comparison", text, "一样" if same else "不一样", unseen=rule.unseen)


def _ask_bigger(scene, rng, rule, first: Object, second: Object) -> Question | None:
    if first.size == second.size:
        return None
    kind = choose(rng, ("shape", "color"))
    values = [getattr(item, kind) for item in scene.objects]
    pair = [getattr(item, kind) for item in (first, second)]
    if any(values.count(value) > 1 for value in pair):
        return None
    spoken = [value if kind == "shape" else f"{value}物体" for value in pair]
    text = word(rng, "bigger", rule.unseen, a=spoken[0], b=spoken[1])
    return Question("comparison", text, pair[0 if first.size == "大" else 1], unseen=rule.unseen)


def ask_yesno(scene: Scene, rng, rule: Rule) -> Question | None:
    """Whether one object has a value; half of them do."""
    kind, truth = choose(rng, ("color", "shape", "size")), bool(rng.integers(2))
    picked = pick_subject(scene, rng, rule, kind)
    if picked is None:
        return None
    index, name, told = picked
    item = scene.objects[index]
    right = getattr(item, kind)
    others = [value for value in VALUES[kind] if value != right]
    wrong = [value for value in others if _possible(rule, item, kind, value)]
    value = right if truth else choose(rng, wrong)
    text = word(rng, "yesno", rule.unseen, x=name, v=f"{value}的" if kind == "size" else value)
    told = told | {kind} if truth else told
    return Question("yesno", text, "是" if truth else "不是", index, told, rule.unseen)


def _possible(rule: Rule, item: Object, kind: str, value: str) -> bool:
    # A pair that never occurs would give the answer away.
    pair = {"shape": (value, item.color), "color": (item.shape, value)}.get(kind, item.pair)
    return pair in rule.pairs


MAKERS = {
    "color": ask_attribute("color"),
    "shape": ask_attribute("shape"),
    "place": ask_attribute("place"),
    "size": ask_attribute("size"),
    "count": ask_count,
    "existence": ask_existence,
    "comparison": ask_comparison,
    "yesno": ask_yesno,
}


def ask(
    scene: Scene,
    rng: np.random.Generator,
    unseen: bool = False,
    kind: str = "",
    mix: Mapping[str, float] = MIX,
) -> Question:
    """One question about a scene, of a kind drawn from `mix` unless given.

    Raises:
      ValueError: the scene has no question of the wanted kind.
    """
    rule = Rule(unseen, ALL_PAIRS if scene.unseen else SEEN_PAIRS)
    for _ in range(200):
        drawn = kind or _draw_kind(rng, mix)
        question = MAKERS[drawn](scene, rng, rule)
        if question is not None:
            return question
    raise ValueError(f"no question of kind {kind!r} fits this scene")


def _draw_kind(rng: np.random.Generator, mix: Mapping[str, float] = MIX) -> str:
    weights = np.asarray(list(mix.values()))
    return str(rng.choice(list(mix), p=weights / weights.sum()))


def ask_several(scene: Scene, rng, count: int, unseen: bool = False) -> list[Question]:
    """`count` different questions about one scene."""
    found: dict[str, Question] = {}
    while len(found) < count:
        question = ask(scene, rng, unseen)
        found.setdefault(question.text, question)
    return list(found.values())


def dialogue(scene: Scene, rng, rounds: int = 4, unseen: bool = False) -> list[Question]:
    """Rounds of questions; after one object was spoken of, the next may refer to it by 它.

    At most half of the rounds refer back, so that the others can be asked on their own.
    """
    asked: list[Question] = []
    back = 0
    while len(asked) < rounds:
        last = asked[-1] if asked else None
        question = None
        if last and last.subject >= 0 and back < rounds // 2 and rng.random() < 0.5:
            question = follow_up(scene, rng, last)
            back += question is not None
        question = question or ask(scene, rng, unseen)
        if question.text not in {former.text for former in asked} or "它" in question.text:
            asked.append(question)
    return asked


def follow_up(scene: Scene, rng, last: Question) -> Question | None:
    """A question about the last round's object, which it calls 它; nothing told already."""
    kinds = [kind for kind in ("color", "shape", "place", "size") if kind not in last.told]
    if not kinds:
        return None
    rule = Rule(subject=last.subject, known=last.told)
    return MAKERS[choose(rng, kinds)](scene, rng, rule)


def ask_clip(clip: motion.Clip, rng, unseen: bool = False) -> Question:
    """One question about a video: what happens, or the object's shape or (constant) color."""
    kinds = ["motion", "shape"] + ["color"] * (clip.motion != "变色")
    kind = choose(rng, kinds)
    name = choose(rng, ("物体", "视频中的物体"))
    text = word(rng, kind, unseen, x=name)
    answer = {"motion": motion_words(clip), "shape": clip.shape, "color": clip.color}[kind]
    return Question(kind, text, answer, 0, frozenset({kind}), unseen)
