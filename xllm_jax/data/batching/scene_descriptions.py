"""The format of described scenes: requests of the world, and what a picture of them shows where.

Words and scenes are drawn as those of `scene_pictures`, without the pictures; where the task of an
example is 'places', most of them name places.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from xllm_jax.core.batch import DescribedScenes
from xllm_jax.data.batching import scene_rows
from xllm_jax.data.example import Example
from xllm_jax.data.synthetic_world.requests import SHARES
from xllm_jax.data.synthetic_world.scene import ALL_PAIRS, PLACES, SIZES, Scene
from xllm_jax.data.text.clip_tokenizer import ClipTokenizer

CLASSES = 1 + len(ALL_PAIRS) * len(SIZES)
"""Nothing, and every pair of shape and color in every size."""
PLACES_TASK, PLACED = "places", {"plain": 0.15, "placed": 0.6, "repeated": 0.05, "related": 0.2}


class Format(scene_rows.DescribedRows[DescribedScenes, ClipTokenizer]):
    """Token ids of requests, and the class of what stands in each place."""

    kind = "descriptions"

    def load_resources(self) -> ClipTokenizer:
        """The tokenizer of the text encoder."""
        return ClipTokenizer(self.data.caption_tokenizer)

    def zeros(self, rows: int, bucket: int = -1) -> DescribedScenes:
        """An empty batch, see `BatchFormat.zeros`."""
        return DescribedScenes(
            ids=self.no_words(rows), places=np.zeros((rows, len(PLACES)), np.int32)
        )

    def made(self, examples: Sequence[Example]) -> DescribedScenes:
        """The ids and classes of some examples."""
        asked = [
            scene_rows.asked_for(one.key, PLACED if one.task == PLACES_TASK else SHARES)
            for one in examples
        ]
        places = np.stack([classes(request.scene) for request, _ in asked])
        return DescribedScenes(self.words(self.resources, asked), places)


def classes(scene: Scene) -> np.ndarray:
    """`[places]` int32 below CLASSES: what stands in each place of a scene, 0 for nothing."""
    found = np.zeros(len(PLACES), np.int32)
    for item in scene.objects:
        kind = ALL_PAIRS.index(item.pair) * len(SIZES) + SIZES.index(item.size)
        found[PLACES.index(item.place)] = 1 + kind
    return found
