"""The format of scene attributes: scenes of the world and what stands on every patch and cell.

Attributes are shape, color and size, and of a patch the place, too, counted from 1; 0 is nothing,
and NOT_ASKED has no loss.
Records come from `sources/world_scenes.py`; the held-out pairs of shape and color are never drawn.

Three of four scenes have objects of any color and off the middle of their cells, as clips do and
what a real encoder is pre-trained on, and every patch tells its object's RGB: from six colors in
seen pairs alone an encoder learns which shapes a color goes with, and its features tell the shape
of a held-out pair wrongly.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np

from xllm_jax.core.batch import SceneAttributes
from xllm_jax.data.batching.scene_rows import SceneRows
from xllm_jax.data.example import Example
from xllm_jax.data.media import image
from xllm_jax.data.synthetic_world.render import RADIUS, RGB, Sprite, render_scene, sprites
from xllm_jax.data.synthetic_world.scene import (
    COLORS,
    HELD_OUT,
    PLACES,
    SHAPES,
    SIZES,
    Scene,
    generator,
    sample_scene,
)

ATTRIBUTES = 3
NOT_ASKED = -1
ANY_LOOK = 0.75  # share of scenes
ALONE, BESIDE = 0.16, 0.05  # of the side: how far objects are from the middle of their cells
REACH = 0.7  # of the radius: how near a patch has to be to an object's center
HUES_APART = 0.06  # of the circle: how far from a shape's held-out color others are


class Format(SceneRows[SceneAttributes, None]):
    """Drawn pictures and their labels."""

    def load_resources(self) -> None:
        """There is no file to read."""

    @property
    def _size(self) -> int:
        return self.data.image.get("size", 96)

    @property
    def _grid(self) -> int:
        """Patches along one side of an image."""
        return self._size // self.data.image.get("patch", 16)

    @property
    def row_tokens(self) -> int:
        """Patches of an image."""
        return self._grid**2

    def zeros(self, rows: int, bucket: int = -1) -> SceneAttributes:
        """An empty batch, see `BatchFormat.zeros`."""
        return SceneAttributes(
            images=np.zeros((rows, self._size, self._size, 3), np.float32),
            patches=np.zeros((rows, self._grid**2, ATTRIBUTES + 1), np.int32),
            colors=np.zeros((rows, self._grid**2, 3), np.float32),
            cells=np.zeros((rows, len(PLACES), ATTRIBUTES), np.int32),
        )

    def made(self, examples: Sequence[Example]) -> SceneAttributes:
        """The pictures of some examples, and their labels."""
        kind = image.normalization(self.data.image)
        drawn = [draw(one.key, self._size, self._grid, kind) for one in examples]
        images, patches, cells, colors = (np.stack(values) for values in zip(*drawn))
        return SceneAttributes(cells, colors, images, patches)


def draw(
    key: str, size: int, grid: int, kind: str = "clip"
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(pixels, labels of patches and of cells, RGB of patches), a function of the key alone."""
    seed, index = map(int, key.split("-"))
    rng = generator(seed, "attributes", index)
    scene = sample_scene(rng, "seen")
    items, colors = sprites(scene), [COLORS.index(item.color) + 1 for item in scene.objects]
    if rng.random() < ANY_LOOK:
        items = [any_look(item, rng, len(items) == 1) for item in items]
        colors = [NOT_ASKED] * len(items)
    own, told = owners(items, grid), [classes(*pair) for pair in zip(items, colors)]
    patches = np.array([(0,) * (ATTRIBUTES + 1), *told], np.int32)[own]
    painted = np.array([(0, 0, 0), *(rgb for *_, rgb, _ in items)], np.float32)[own] / 255
    pixels = image.resize(render_scene(scene, items=items), size)
    return image.normalize(pixels, kind), patches, cell_labels(told), painted


def any_look(item: Sprite, rng: np.random.Generator, alone: bool) -> Sprite:
    """The same shape in any color, off the middle of its cell, of any size where it is alone."""
    shape, x, y, radius, _, turn = item
    reach = ALONE if alone else BESIDE
    x, y = (float(np.clip(at + rng.uniform(-reach, reach), 0.12, 0.88)) for at in (x, y))
    if alone:
        radius = float(rng.uniform(0.9 * RADIUS["小"], 1.1 * RADIUS["大"]))
    return shape, x, y, radius, any_color(shape, rng), turn


def any_color(shape: str, rng: np.random.Generator) -> tuple[int, int, int]:
    """RGB of any color that stands out and is not near the color held out for the shape."""
    held_out = [RGB[color] for kind, color in sorted(HELD_OUT) if kind == shape]
    hues = [colorsys.rgb_to_hsv(*(x / 255 for x in rgb))[0] for rgb in held_out]
    while True:
        hue, saturation = float(rng.random()), float(rng.random())
        if all(min((hue - far) % 1, (far - hue) % 1) > HUES_APART for far in hues):
            rgb = colorsys.hsv_to_rgb(hue, saturation, float(rng.uniform(0.65, 1.0)))
            red, green, blue = (round(255 * x) for x in rgb)
            return red, green, blue


def classes(item: Sprite, color: int) -> tuple[int, int, int, int]:
    """Shape, color, size and place of what is drawn as classes, by where it is and how large."""
    shape, x, y, radius, *_ = item
    size = "大" if radius > (RADIUS["大"] + RADIUS["小"]) / 2 else "小"
    place = 3 * int(3 * y) + int(3 * x)
    return SHAPES.index(shape) + 1, color, SIZES.index(size) + 1, place + 1


def owners(items: Sequence[Sprite], grid: int) -> np.ndarray:
    """`[grid * grid]` int32: the number of the object that reaches into each patch, 0 for none.

    A small object between four patches covers the center of none.
    """
    low = np.arange(grid) / grid
    found = np.zeros((grid, grid), np.int32)
    for number, (_, x, y, radius, *_) in enumerate(items, 1):
        across, down = (np.maximum(0, np.maximum(low - at, at - low - 1 / grid)) for at in (x, y))
        found[across[None] ** 2 + down[:, None] ** 2 < (REACH * radius) ** 2] = number
    return found.reshape(-1)


def patch_labels(scene: Scene, grid: int) -> np.ndarray:
    """`[grid * grid, 4]` int32: what the patches of a scene's own picture show."""
    items = sprites(scene)
    told = [classes(x, COLORS.index(o.color) + 1) for x, o in zip(items, scene.objects)]
    return np.array([(0,) * (ATTRIBUTES + 1), *told], np.int32)[owners(items, grid)]


def cell_labels(told: Sequence[tuple[int, ...]]) -> np.ndarray:
    """`[places, 3]` int32: shape, color and size of the object in each place."""
    labels = np.zeros((len(PLACES), ATTRIBUTES), np.int32)
    for *attributes, place in told:
        labels[place - 1] = attributes
    return labels
