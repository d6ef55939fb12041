"""The attributes form: drawn scenes of the embedded world and what stands on every patch and cell.

Attributes are shape, color and size, counted from 1; 0 is nothing. Records come from
`sources/world_scenes.py`; the held-out pairs of shape and color are never drawn.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from xllm_jax.core.stage import Data
from xllm_jax.data.media import image
from xllm_jax.data.record import Mode, Record, Skipped
from xllm_jax.data.synthetic_world.render import PIXELS, object_boxes, render_scene
from xllm_jax.data.synthetic_world.scene import (
    COLORS,
    PLACES,
    SHAPES,
    SIZES,
    Object,
    Scene,
    generator,
    sample_scene,
)

ATTRIBUTES = 3


@dataclasses.dataclass(frozen=True)
class Plan:
    """Rows of a global batch."""

    rows: tuple[Record, ...]
    skipped: tuple[Skipped, ...] = ()
    cut: int = 0

    def supervised(self) -> int:
        """Pictures of the plan."""
        return len(self.rows)

    def members(self, rows: slice) -> list[tuple[int, int, Record]]:
        """(row, 1, record) of every picture in some rows, rows counted from the first."""
        return [(number, 1, record) for number, record in enumerate(self.rows[rows])]


def tools(data: Data) -> int:
    """Patches along one side of an image."""
    return data.image.get("size", 96) // data.image.get("patch", 16)


def plan(records: Sequence[Record], kit: int, data: Data, mode: Mode) -> Plan:
    """One row per record."""
    return Plan(tuple(records))


def batches(records: Sequence[Record], kit: int, data: Data, mode: Mode) -> list[Plan]:
    """Plans over all records in order; the last may be shorter."""
    starts = range(0, len(records), data.examples)
    return [Plan(tuple(records[start : start + data.examples])) for start in starts]


def fill(
    made: Plan, rows: slice, kit: int, data: Data, mode: Mode, load: object = None
) -> tuple[dict[str, np.ndarray], list[Skipped]]:
    """Draws one host's rows; there is no file to `load`.

    Returns:
      ({'images': `[B, H, W, 3]` float32, 'patches': `[B, N, 3]` and 'cells': `[B, 9, 3]` int32
      classes of shape, color and size}, nothing skipped).
    """
    size = data.image.get("size", 96)
    drawn = [draw(record.example.key, size, kit) for record in made.rows[rows]]
    images, patches, cells = (np.stack(values) for values in zip(*drawn))
    return {"images": images, "patches": patches, "cells": cells}, []


def padding(batch: dict[str, np.ndarray]) -> dict[str, tuple[int, int]]:
    """{what: (used, room)} of a batch: every row holds a picture."""
    return {"image": (len(batch["images"]), len(batch["images"]))}


def draw(key: str, size: int, grid: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One picture with its labels, a function of the key alone."""
    seed, index = map(int, key.split("-"))
    scene = sample_scene(generator(seed, "attributes", index), "seen")
    pixels = image.normalize(image.resize(render_scene(scene), size))
    return pixels, patch_labels(scene, grid), cell_labels(scene)


def classes(item: Object) -> tuple[int, int, int]:
    """Shape, color and size of an object as classes."""
    return (
        SHAPES.index(item.shape) + 1,
        COLORS.index(item.color) + 1,
        SIZES.index(item.size) + 1,
    )


def patch_labels(scene: Scene, grid: int) -> np.ndarray:
    """`[grid * grid, 3]` int32: an object owns the patches whose center its circle covers."""
    center = (np.arange(grid) + 0.5) * PIXELS / grid
    labels = np.zeros((grid, grid, ATTRIBUTES), np.int32)
    for item, (x, y, width, height) in zip(scene.objects, object_boxes(scene)):
        across = (center[None] - x - width / 2) ** 2 + (center[:, None] - y - height / 2) ** 2
        labels[across < (width / 2) ** 2] = classes(item)
    return labels.reshape(-1, ATTRIBUTES)


def cell_labels(scene: Scene) -> np.ndarray:
    """`[places, 3]` int32: the object at each place."""
    labels = np.zeros((len(PLACES), ATTRIBUTES), np.int32)
    for item in scene.objects:
        labels[PLACES.index(item.place)] = classes(item)
    return labels
