"""The format of described pictures: requests of the world, drawn, beside the words for them.

Records come from `sources/world_scenes.py`; an example's key alone says what is drawn. Whoever
learns to draw learns every pair of shape and color, as a published text-to-image model has: the
held-out pairs are held out from what the LLM and its projections learn.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from xllm_jax.core.batch import DescribedPictures
from xllm_jax.data.batching.batch_format import BatchPlan, Entry, RowPerRecord
from xllm_jax.data.media import image, modalities
from xllm_jax.data.record import Mode, Record, Skipped
from xllm_jax.data.synthetic_world.render import render_scene
from xllm_jax.data.synthetic_world.requests import SHARES, Request, sample_request
from xllm_jax.data.synthetic_world.scene import generator
from xllm_jax.data.text.clip_tokenizer import ClipTokenizer

UNSAID = 0.1  # share of pictures without words, which guidance needs (arXiv 2207.12598)


class Format(RowPerRecord[Entry, DescribedPictures, ClipTokenizer]):
    """Drawn pictures and token ids of what they show."""

    @property
    def media(self) -> tuple[str, ...]:
        """Modalities whose files a batch may hold."""
        return ("image",)

    def load_resources(self) -> ClipTokenizer:
        """The tokenizer of the text encoder."""
        return ClipTokenizer(self.data.caption_tokenizer)

    @property
    def row_tokens(self) -> int:
        """Tokens of a description."""
        return self.data.caption_length

    def zeros(self, rows: int, bucket: int = -1) -> DescribedPictures:
        """An empty batch, see `BatchFormat.zeros`."""
        side = self.data.image["size"]
        return DescribedPictures(
            ids=np.zeros((rows, self.data.caption_length), np.int32),
            images=np.zeros((rows, side, side, 3), np.float32),
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
    ) -> tuple[DescribedPictures, list[Skipped]]:
        """Draws some rows, see `BatchFormat.fill`; rows without a record are left out.

        Returns:
          (the pictures and ids, nothing skipped).
        """
        keys = [entry.record.example.key for row in plan.rows[rows] for entry in row]
        asked = [asked_for(key) for key in keys]
        images = np.stack([picture(request, self.data.image["size"]) for request, _ in asked])
        said = [request.said if told else "" for request, told in asked]
        return DescribedPictures(self.resources.encode(said, self.data.caption_length), images), []

    def padding(self, batch: DescribedPictures) -> dict[str, tuple[int, int]]:
        """{kind of place: (used, capacity)}: every row holds a picture."""
        return {"image": (len(batch.images), len(batch.images))}


def asked_for(key: str, shares: Mapping[str, float] = SHARES) -> tuple[Request, bool]:
    """The request of an example's key, and whether the picture gets its words.

    Args:
      key: 'SEED-NUMBER'.
      shares: of the kinds of requests, see `sample_request`.
    """
    seed, index = map(int, key.split("-"))
    rng = generator(seed, "request", index)
    told = bool(rng.random() >= UNSAID)
    unseen_wording = bool(rng.random() < 0.25)
    return sample_request(rng, "all", unseen_wording, shares), told


def picture(request: Request, side: int) -> np.ndarray:
    """A picture that fulfils a request, `[side, side, 3]` float32 from -1 to 1."""
    return image.to_signed(image.resize(render_scene(request.scene, grain=False), side))
