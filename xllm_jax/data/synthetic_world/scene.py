"""Scenes: the ground truth of the embedded world, as plain data.

A scene is one to three objects on a 3 x 3 grid. Everything else in this folder (pictures, captions,
questions, spoken sentences) is a function of a scene and a random generator, so that each answer is
known exactly.
"""

from __future__ import annotations

import dataclasses
import zlib

import numpy as np

COLORS = ("红色", "绿色", "蓝色", "黄色", "紫色", "白色")
SHAPES = ("圆形", "方形", "三角形", "星形", "十字形")
SIZES = ("大", "小")
PLACES = ("左上", "上面", "右上", "左边", "中间", "右边", "左下", "下面", "右下")

# One held-out color for every shape: each of these colors and shapes is seen in other pairs.
HELD_OUT = frozenset(
    {
        ("圆形", "黄色"),
        ("方形", "绿色"),
        ("三角形", "紫色"),
        ("星形", "红色"),
        ("十字形", "蓝色"),
    }
)
ALL_PAIRS = tuple((shape, color) for shape in SHAPES for color in COLORS)
SEEN_PAIRS = tuple(pair for pair in ALL_PAIRS if pair not in HELD_OUT)

BACKGROUNDS = ("noise", "stripes", "checks", "gradient", "clouds", "weave")
COUNT_SHARES = (0.31, 0.36, 0.33)


@dataclasses.dataclass(frozen=True)
class Object:
    """One object: shape, color, size and place, each by its Chinese word."""

    shape: str
    color: str
    size: str
    place: str

    @property
    def pair(self) -> tuple[str, str]:
        """(shape, color), the part that held-out splits speak about."""
        return self.shape, self.color


@dataclasses.dataclass(frozen=True)
class Scene:
    """Objects in reading order, a background texture, and the seed of everything random in it."""

    objects: tuple[Object, ...]
    background: str
    seed: int

    @property
    def unseen(self) -> bool:
        """Whether any object is a held-out (shape, color) pair."""
        return any(item.pair in HELD_OUT for item in self.objects)


def generator(seed: int, *path: str | int) -> np.random.Generator:
    """A random generator that depends on the seed and the whole path, and on nothing else."""
    words = [step if isinstance(step, int) else zlib.crc32(step.encode()) for step in path]
    return np.random.default_rng([seed, *words])


def choose(rng: np.random.Generator, items):
    """One of `items`, uniformly, as it is (numpy's own choice turns strings into arrays)."""
    return items[int(rng.integers(len(items)))]


def sample_scene(rng: np.random.Generator, pairs: str = "seen", count: int = 0) -> Scene:
    """Draws a scene.

    Args:
      rng: source of randomness.
      pairs: 'seen' (no held-out pair), 'unseen' (at least one held-out pair) or 'all'.
      count: number of objects, 0 to draw it.
    """
    count = count or 1 + int(rng.choice(3, p=COUNT_SHARES))
    pool = ALL_PAIRS if pairs == "all" else SEEN_PAIRS
    chosen: list[tuple[str, str]] = []
    if pairs == "unseen":
        chosen.append(choose(rng, sorted(HELD_OUT)))
    while len(chosen) < count:
        chosen.append(_another_pair(rng, chosen, pool))
    places = sorted(int(place) for place in rng.choice(len(PLACES), count, replace=False))
    order = rng.permutation(count)
    objects = tuple(
        Object(*chosen[int(index)], choose(rng, SIZES), PLACES[place])
        for index, place in zip(order, places)
    )
    return Scene(objects, choose(rng, BACKGROUNDS), int(rng.integers(2**31)))


def _another_pair(rng, chosen, pool):
    # Independent draws would share a color too rarely for questions about "the same color".
    free = [pair for pair in pool if pair not in chosen]
    if chosen and rng.random() < 0.35:
        side = int(rng.integers(2))
        alike = [pair for pair in free if pair[side] == choose(rng, chosen)[side]]
        free = alike or free
    return choose(rng, free)
