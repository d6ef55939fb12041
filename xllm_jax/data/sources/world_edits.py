"""Requests to draw a picture of the embedded world again in another color.

    Source("world_edits", "world")

PATH is the world's folder. A request shows one of its pictures and names a color that all objects
shall have: 画一张一样的图，但是蓝色的. The caption says what is then to be seen, with every place.
The training split names no held-out pair of shape and color; validation and test may.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from xllm_jax.core import bounded, damage
from xllm_jax.core.errors import UserError
from xllm_jax.data.example import Example
from xllm_jax.data.rows.lazy import Lazy
from xllm_jax.data.synthetic_world import plan
from xllm_jax.data.synthetic_world.requests import COLOR, EDITS, Request, recolored
from xllm_jax.data.synthetic_world.scene import COLORS, SEEN_PAIRS, Scene, choose, generator
from xllm_jax.data.text import instructions_to_draw

PREFIX = "edit"


def examples(
    path: str, split: str = "train", echo: bool = False, reply: bool = False
) -> Sequence[Example]:
    """One request for every picture of a split.

    Args:
      path: folder of the world.
      split: train, val or test.
      echo, reply: as of `sources/requests.py`.

    Raises:
      UserError: no world there, or an unknown split.
    """
    if split not in plan.SPLITS:
        hint = f"Choices: {', '.join(plan.SPLITS)}"
        raise UserError(f"unknown split {split!r}", field="split", hint=hint)
    file = Path(path) / "world.json"
    if not file.is_file():
        raise UserError("holds no world.json", field=path, hint="Write it: xllm world")
    about = bounded.read_json(file)
    with damage.reading(file):
        seed, count = int(about["seed"]), int(about["sizes"][f"{split}_images"])
        if count < 0:
            raise ValueError(f"{split}_images is {count}")
    words = instructions_to_draw.find("zh", "options.wording")

    def example(index: int) -> Example:
        key = f"{PREFIX}-{split}-{seed}-{index}"
        request, instruction = _edit(key)
        shown = Path(path) / "coco" / split / plan.picture(seed, split, index).file_name
        made = instructions_to_draw.request(key, request.said, "image", words, echo, reply)
        media = (("image", str(shown)),)
        return dataclasses.replace(made, media=media, instruction=instruction)

    return Lazy(count, example)


def asked_for(key: str) -> Request:
    """The request of an example's key."""
    return _edit(key)[0]


def _edit(key: str) -> tuple[Request, str]:
    """What is to be seen, and the words that ask for it."""
    _, split, seed, index = key.split("-")
    before = plan.scene(int(seed), split, int(index))
    rng = generator(int(seed), PREFIX, split, int(index))
    color = choose(rng, _choices(before, split))
    return recolored(before, color), choose(rng, EDITS).replace(COLOR, color)


def _choices(scene: Scene, split: str) -> tuple[str, ...]:
    """Colors that change every object, else those that change any; in training, no held-out pair.

    Three shapes have a held-out color each, and three colors are left: never all of one scene.
    """
    shapes = {item.shape for item in scene.objects}
    held = {item.color for item in scene.objects}
    known = [c for c in COLORS if split != "train" or all((s, c) in SEEN_PAIRS for s in shapes)]
    every = tuple(color for color in known if color not in held)
    return every or tuple(color for color in known if held != {color})
