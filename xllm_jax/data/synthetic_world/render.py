"""Scenes to pictures: Pillow, supersampled, on textured and noisy backgrounds."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from xllm_jax.data.synthetic_world.scene import PLACES, Object, Scene, generator

PIXELS = 128
RGB = {
    "红色": (226, 38, 38),
    "绿色": (38, 186, 62),
    "蓝色": (38, 92, 240),
    "黄色": (246, 216, 36),
    "紫色": (176, 56, 212),
    "白色": (248, 248, 248),
}
RADIUS = {"大": 0.140, "小": 0.078}  # shares of the picture's side
SUPERSAMPLING = 3
Sprite = tuple[str, float, float, float, tuple[int, int, int], float]


def cell_center(place: str) -> tuple[float, float]:
    """(x, y) of a grid cell's center as shares of the picture's side."""
    row, column = divmod(PLACES.index(place), 3)
    return (2 * column + 1) / 6, (2 * row + 1) / 6


def render_scene(
    scene: Scene,
    pixels: int = PIXELS,
    grain: bool = True,
    items: Sequence[Sprite] = (),
) -> Image.Image:
    """The picture of a scene, `[pixels, pixels, 3]` uint8 as a Pillow image.

    Args:
      scene: what it shows.
      pixels: of a side.
      grain: as a sensor gives it.
      items: what is drawn in the place of the scene's own objects; empty for these.
    """
    rng = generator(scene.seed, "background")
    drawn = draw(background(scene.background, rng, pixels), items or sprites(scene))
    whole = np.clip(drawn, 0, 255).astype(np.uint8)
    return Image.fromarray(add_noise(drawn, rng) if grain else whole)


def sprites(scene: Scene) -> list[Sprite]:
    """(shape, x, y, radius, rgb, turn) of every object, with the small changes of its look."""
    rng = generator(scene.seed, "jitter")
    return [(item.shape, *jitter(item, rng)) for item in scene.objects]


def object_boxes(scene: Scene, pixels: int = PIXELS) -> list[tuple[int, int, int, int]]:
    """(x, y, width, height) in pixels of every object, as `render_scene` draws it."""
    boxes = []
    for _, x, y, radius, _, _ in sprites(scene):
        corner = (round((x - radius) * pixels), round((y - radius) * pixels))
        boxes.append((*corner, round(2 * radius * pixels), round(2 * radius * pixels)))
    return boxes


def jitter(item: Object, rng: np.random.Generator):
    """(x, y, radius, rgb, turn): an object's look with small random changes."""
    x, y = (center + float(rng.uniform(-0.022, 0.022)) for center in cell_center(item.place))
    radius = RADIUS[item.size] * float(rng.uniform(0.93, 1.06))
    turn = float(rng.uniform(-0.14, 0.14))
    return x, y, radius, jitter_color(item.color, rng), turn


def jitter_color(color: str, rng: np.random.Generator) -> tuple[int, int, int]:
    """The color's RGB with hue, saturation and brightness moved a little."""
    hue, saturation, value = colorsys.rgb_to_hsv(*(channel / 255 for channel in RGB[color]))
    hue = (hue + float(rng.uniform(-0.015, 0.015))) % 1
    saturation = saturation * float(rng.uniform(0.9, 1.0))
    value = min(1.0, value * float(rng.uniform(0.92, 1.04)))
    red, green, blue = (round(255 * x) for x in colorsys.hsv_to_rgb(hue, saturation, value))
    return red, green, blue


def outline(shape: str, x: float, y: float, radius: float, turn: float) -> list:
    """Corner points of a shape, in the units of x, y and radius (a circle gets 48 corners)."""
    if shape == "圆形":
        polar = [(i / 48, 0.95) for i in range(48)]
    elif shape == "方形":
        polar = [((i + 0.5) / 4, 1.22) for i in range(4)]
    elif shape == "三角形":
        polar = [(i / 3 - 0.25, 1.2) for i in range(3)]
    elif shape == "星形":
        polar = [(i / 10 - 0.25, 1.2 if i % 2 == 0 else 0.48) for i in range(10)]
    else:
        arm, long = 0.34, 1.08
        corners = [(long, -arm), (long, arm), (arm, arm), (arm, long), (-arm, long), (-arm, arm)]
        corners += [(-a, -b) for a, b in corners]
        polar = [(math.atan2(b, a) / math.tau, math.hypot(a, b)) for a, b in corners]
    angles = [(math.tau * angle + turn, length * radius) for angle, length in polar]
    return [(x + length * math.cos(a), y + length * math.sin(a)) for a, length in angles]


def draw(base: np.ndarray, items: Sequence[Sprite]) -> np.ndarray:
    """Paints sprites (shape, x, y, radius, rgb, turn) over a `[pixels, pixels, 3]` background."""
    side = base.shape[0]
    picture = base.astype(np.float32)
    for shape, x, y, radius, rgb, turn in items:
        points = np.asarray(outline(shape, x, y, radius, turn)) * side
        # Only the part around the shape: its mask is a tenth of the picture.
        low = np.clip(np.floor(points.min(0)).astype(int) - 1, 0, side)
        high = np.clip(np.ceil(points.max(0)).astype(int) + 2, 0, side)
        width, height = (int(n) for n in (high - low) * SUPERSAMPLING)
        mask = Image.new("L", (width, height), 0)
        ImageDraw.Draw(mask).polygon([tuple(p) for p in (points - low) * SUPERSAMPLING], fill=255)
        alpha = np.asarray(mask.reduce(SUPERSAMPLING), np.float32)[..., None] / 255
        part = picture[low[1] : high[1], low[0] : high[0]]
        part += (np.asarray(rgb, np.float32) - part) * alpha
    return picture


def add_noise(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Sensor-like noise of a random strength; returns uint8."""
    noise = rng.standard_normal(picture.shape[:2], np.float32)[..., None]
    return np.clip(picture + noise * float(rng.uniform(1, 6)), 0, 255).astype(np.uint8)


def background(texture: str, rng: np.random.Generator, pixels: int = PIXELS) -> np.ndarray:
    """A muted, dark texture, `[pixels, pixels, 3]` float32, on which all colors stand out."""
    hue, saturation = float(rng.random()), float(rng.uniform(0.02, 0.2))
    value = float(rng.uniform(0.2, 0.42))
    base = np.asarray(colorsys.hsv_to_rgb(hue, saturation, value), np.float32) * 255
    pattern = _pattern(texture, rng, pixels)
    strength = float(rng.uniform(8, 20))
    return base + strength * pattern[..., None].astype(np.float32)


def _pattern(texture: str, rng: np.random.Generator, pixels: int) -> np.ndarray:
    """`[pixels, pixels]` values around zero, mostly within -1..1."""
    y, x = np.mgrid[0:pixels, 0:pixels] / pixels
    angle, waves = float(rng.uniform(0, math.pi)), float(rng.uniform(4, 12))
    along = x * math.cos(angle) + y * math.sin(angle)
    across = y * math.cos(angle) - x * math.sin(angle)
    if texture == "stripes":
        return np.sin(math.tau * waves * along)
    if texture == "checks":
        return np.sign(np.sin(math.tau * waves / 2 * along) * np.sin(math.tau * waves / 2 * across))
    if texture == "gradient":
        return 2 * (along - along.mean())
    if texture == "weave":
        return (np.sin(math.tau * waves * along) + np.sin(math.tau * waves * across)) / 2
    cells = 6 if texture == "clouds" else 32
    coarse = rng.standard_normal((cells, cells)).astype(np.float32)
    return np.asarray(Image.fromarray(coarse).resize((pixels, pixels), Image.Resampling.BICUBIC))
