"""The format of scene attributes: scenes of the world and what stands on every patch and cell.

Attributes are shape, color and size, counted from 1; 0 is nothing. Records come from
`sources/world_scenes.py`; the held-out pairs of shape and color are never drawn.
"""

from __future__ import annotations

import numpy as np

from xllm_jax.core.batch import SceneAttributes
from xllm_jax.data.batching.batch_format import BatchPlan, Entry, RowPerRecord
from xllm_jax.data.media import image, modalities
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


class Format(RowPerRecord[Entry, SceneAttributes, None]):
    """Drawn pictures and their labels."""

    @property
    def media(self) -> tuple[str, ...]:
        """Modalities whose files a batch may hold."""
        return ("image",)

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
            patches=np.zeros((rows, self._grid**2, ATTRIBUTES), np.int32),
            cells=np.zeros((rows, len(PLACES), ATTRIBUTES), np.int32),
        )

    def entry(self, record: Record, mode: Mode) -> Entry:
        """The row of one record."""
        return Entry(record)

    def fill(
        self,
        plan: BatchPlan[Entry],
        rows: slice,
        mode: Mode,
        load: modalities.Load = modalities.load,
    ) -> tuple[SceneAttributes, list[Skipped]]:
        """Draws some rows, see `BatchFormat.fill`; rows without a record are left out.

        Returns:
          ({'images': `[B, H, W, 3]` float32, 'patches': `[B, N, 3]` and 'cells': `[B, 9, 3]` int32
          classes of shape, color and size}, nothing skipped).
        """
        keys = [entry.record.example.key for row in plan.rows[rows] for entry in row]
        kind = image.normalization(self.data.image)
        drawn = [draw(key, self._size, self._grid, kind) for key in keys]
        images, patches, cells = (np.stack(values) for values in zip(*drawn))
        return SceneAttributes(cells, images, patches), []

    def padding(self, batch: SceneAttributes) -> dict[str, tuple[int, int]]:
        """{kind of place: (used, capacity)}: every row holds a picture."""
        return {"image": (len(batch.images), len(batch.images))}


def draw(
    key: str, size: int, grid: int, kind: str = "clip"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One picture with its labels, a function of the key alone."""
    seed, index = map(int, key.split("-"))
    scene = sample_scene(generator(seed, "attributes", index), "seen")
    pixels = image.normalize(image.resize(render_scene(scene), size), kind)
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
