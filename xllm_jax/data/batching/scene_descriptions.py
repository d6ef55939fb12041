"""The format of described scenes: requests of the world, and what a picture of them shows where.

Words and scenes are drawn as those of `scene_pictures`, without the pictures; where the task of an
example is 'places', most of them name places.
"""

from __future__ import annotations

import numpy as np

from xllm_jax.core.batch import DescribedScenes
from xllm_jax.data.batching import scene_pictures
from xllm_jax.data.batching.batch_format import BatchPlan, Entry, RowPerRecord
from xllm_jax.data.media import modalities
from xllm_jax.data.record import Mode, Record, Skipped
from xllm_jax.data.synthetic_world.requests import SHARES
from xllm_jax.data.synthetic_world.scene import ALL_PAIRS, PLACES, SIZES, Scene
from xllm_jax.data.text.clip_tokenizer import ClipTokenizer

CLASSES = 1 + len(ALL_PAIRS) * len(SIZES)
"""Nothing, and every pair of shape and color in every size."""
PLACES_TASK, PLACED = "places", {"plain": 0.15, "placed": 0.6, "repeated": 0.05, "related": 0.2}


class Format(RowPerRecord[Entry, DescribedScenes, ClipTokenizer]):
    """Token ids of requests, and the class of what stands in each place."""

    @property
    def media(self) -> tuple[str, ...]:
        """Modalities whose files a batch may hold."""
        return ()

    def load_resources(self) -> ClipTokenizer:
        """The tokenizer of the text encoder."""
        return ClipTokenizer(self.data.caption_tokenizer)

    @property
    def row_tokens(self) -> int:
        """Tokens of a description."""
        return self.data.caption_length

    def zeros(self, rows: int, bucket: int = -1) -> DescribedScenes:
        """An empty batch, see `BatchFormat.zeros`."""
        return DescribedScenes(
            ids=np.zeros((rows, self.data.caption_length), np.int32),
            places=np.zeros((rows, len(PLACES)), np.int32),
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
    ) -> tuple[DescribedScenes, list[Skipped]]:
        """Writes some rows, see `BatchFormat.fill`; rows without a record are left out.

        Returns:
          (the ids and classes, nothing skipped).
        """
        examples = [entry.record.example for row in plan.rows[rows] for entry in row]
        asked = [
            scene_pictures.asked_for(one.key, PLACED if one.task == PLACES_TASK else SHARES)
            for one in examples
        ]
        said = [request.said if told else "" for request, told in asked]
        ids = self.resources.encode(said, self.data.caption_length)
        return DescribedScenes(ids, np.stack([classes(one.scene) for one, _ in asked])), []

    def padding(self, batch: DescribedScenes) -> dict[str, tuple[int, int]]:
        """{kind of place: (used, capacity)}: every row holds a description."""
        return {"descriptions": (len(batch.ids), len(batch.ids))}


def classes(scene: Scene) -> np.ndarray:
    """`[places]` int32 below CLASSES: what stands in each place of a scene, 0 for nothing."""
    found = np.zeros(len(PLACES), np.int32)
    for item in scene.objects:
        kind = ALL_PAIRS.index(item.pair) * len(SIZES) + SIZES.index(item.size)
        found[PLACES.index(item.place)] = 1 + kind
    return found
