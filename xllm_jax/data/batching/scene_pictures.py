"""The format of described pictures: requests of the world, drawn, beside the words for them.

Whoever learns to draw learns every pair of shape and color, as a published text-to-image model has:
the held-out pairs are held out from what the LLM and its projections learn.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from xllm_jax.core.batch import DescribedPictures
from xllm_jax.data.batching import scene_rows
from xllm_jax.data.example import Example
from xllm_jax.data.media import image
from xllm_jax.data.synthetic_world.render import render_scene
from xllm_jax.data.synthetic_world.requests import Request
from xllm_jax.data.text.clip_tokenizer import ClipTokenizer


class Format(scene_rows.DescribedRows[DescribedPictures, ClipTokenizer]):
    """Drawn pictures and token ids of what they show."""

    def load_resources(self) -> ClipTokenizer:
        """The tokenizer of the text encoder."""
        return ClipTokenizer(self.data.caption_tokenizer)

    def zeros(self, rows: int, bucket: int = -1) -> DescribedPictures:
        """An empty batch, see `BatchFormat.zeros`."""
        side = self.data.image["size"]
        images = np.zeros((rows, side, side, 3), np.float32)
        return DescribedPictures(ids=self.no_words(rows), images=images)

    def made(self, examples: Sequence[Example]) -> DescribedPictures:
        """The pictures of some examples, and their ids."""
        asked = [scene_rows.asked_for(one.key) for one in examples]
        images = np.stack([picture(request, self.data.image["size"]) for request, _ in asked])
        return DescribedPictures(self.words(self.resources, asked), images)


def picture(request: Request, side: int) -> np.ndarray:
    """A picture that fulfils a request, `[side, side, 3]` float32 from -1 to 1."""
    return image.to_signed(image.resize(render_scene(request.scene, grain=False), side))
