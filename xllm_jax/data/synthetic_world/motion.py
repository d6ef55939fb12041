"""Clips: one object that moves, grows, shrinks, blinks, vanishes or changes color, and its MP4."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterable

import av
import numpy as np

from xllm_jax.data.synthetic_world import render
from xllm_jax.data.synthetic_world.scene import (
    BACKGROUNDS,
    COLORS,
    HELD_OUT,
    PLACES,
    SEEN_PAIRS,
    SIZES,
    Object,
    choose,
    generator,
)

MOTIONS = (
    "向左移动",
    "向右移动",
    "向上移动",
    "向下移动",
    "变大",
    "变小",
    "闪烁",
    "消失",
    "变色",
)
FRAMES, RATE = 24, 12
DIRECTIONS = {"向左移动": (-1, 0), "向右移动": (1, 0), "向上移动": (0, -1), "向下移动": (0, 1)}


@dataclasses.dataclass(frozen=True)
class Clip:
    """One video's ground truth; `to_color` is the second color of 变色, else the first one."""

    shape: str
    color: str
    to_color: str
    motion: str
    size: str
    place: str
    background: str
    seed: int

    @property
    def unseen(self) -> bool:
        """Whether a held-out (shape, color) pair is ever visible."""
        return bool({(self.shape, self.color), (self.shape, self.to_color)} & HELD_OUT)


@dataclasses.dataclass(frozen=True)
class Moment:
    """What is visible at one time: center and radius (shares of the side), color, or nothing."""

    visible: bool
    x: float
    y: float
    radius: float
    color: str


def sample_clip(rng: np.random.Generator, pairs: str = "seen", motion: str = "") -> Clip:
    """Draws a clip; `pairs` is 'seen' or 'unseen' as for scenes, `motion` may be fixed."""
    pool = SEEN_PAIRS if pairs == "seen" else sorted(HELD_OUT)
    shape, color = choose(rng, pool)
    motion = motion or choose(rng, MOTIONS)
    others = [other for other in COLORS if other != color and (shape, other) not in HELD_OUT]
    to_color = choose(rng, others) if motion == "变色" else color
    place, size = choose(rng, PLACES), choose(rng, SIZES)
    seed = int(rng.integers(2**31))
    return Clip(shape, color, to_color, motion, size, place, choose(rng, BACKGROUNDS), seed)


def moments(clip: Clip, times: Iterable[float]) -> list[Moment]:
    """The object at each of `times` in 0..1."""
    rng = generator(clip.seed, "path")
    start, end = 0.82 + rng.uniform(-0.03, 0.03), 0.18 + rng.uniform(-0.03, 0.03)
    return [_moment(clip, time, start, end) for time in times]


def _moment(clip: Clip, time: float, start: float, end: float) -> Moment:
    x, y = render.cell_center(clip.place)
    radius = render.RADIUS[clip.size]
    if clip.motion in DIRECTIONS:
        across, down = DIRECTIONS[clip.motion]
        # Moving left starts at the right side, moving right is the mirror image; so up and down.
        along = start + (end - start) * time if across + down < 0 else end + (start - end) * time
        x, y = (along, y) if across else (x, along)
    if clip.motion in ("变大", "变小"):
        small, large = render.RADIUS["小"] * 0.9, render.RADIUS["大"] * 1.1
        grown = time if clip.motion == "变大" else 1 - time
        radius = small + (large - small) * grown
    visible = {"闪烁": int(time * 4) % 2 == 0, "消失": time < 0.5}.get(clip.motion, True)
    color = clip.to_color if time >= 0.5 else clip.color
    return Moment(visible, float(x), float(y), float(radius), color)


def seen_object(clip: Clip, time: float) -> Object | None:
    """The moment in words of the grid (nearest size and cell), None when nothing is visible."""
    (now,) = moments(clip, (time,))
    if not now.visible:
        return None
    column, row = min(2, int(now.x * 3)), min(2, int(now.y * 3))
    middle = (render.RADIUS["大"] + render.RADIUS["小"]) / 2
    size = "大" if now.radius > middle else "小"
    return Object(clip.shape, now.color, size, PLACES[3 * row + column])


def render_clip(clip: Clip, pixels: int = render.PIXELS) -> np.ndarray:
    """The frames of a clip, `[FRAMES, pixels, pixels, 3]` uint8."""
    rng = generator(clip.seed, "render")
    base = render.background(clip.background, rng, pixels)
    turn = float(rng.uniform(-0.14, 0.14))
    colors = {clip.color: render.jitter_color(clip.color, rng)}
    colors.setdefault(clip.to_color, render.jitter_color(clip.to_color, rng))
    frames = []
    for now in moments(clip, ((index + 0.5) / FRAMES for index in range(FRAMES))):
        sprite = (clip.shape, now.x, now.y, now.radius, colors[now.color], turn)
        picture = render.draw(base, [sprite] if now.visible else [])
        frames.append(render.add_noise(picture, rng))
    return np.stack(frames)


def write_mp4(path: str | pathlib.Path, frames: np.ndarray) -> None:
    """Encodes `[frames, height, width, 3]` uint8 as MP4: H.264 where there is x264, else MPEG-4."""
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    options = {"crf": "20", "preset": "ultrafast"} if codec == "libx264" else {"qscale": "3"}
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=RATE, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        # One thread keeps the bytes the same on every machine size.
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
