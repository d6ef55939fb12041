"""The format of described latents: what an autoencoder made of the world's pictures, once.

    DIR/about.json        of which scenes, by which scaling
    DIR/means.npy         [pictures, height, width, channels] float16
    DIR/deviations.npy    the same of the posterior's deviation

`feature_cache/scene_latents.py` writes the folder, and the source's path says where it is. Record i
of the stream is picture i; its words are drawn as for `scene_pictures`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from xllm_jax.core import bounded
from xllm_jax.core.batch import DescribedLatents
from xllm_jax.core.errors import UserError
from xllm_jax.data.batching import scene_pictures
from xllm_jax.data.batching.batch_format import BatchPlan, Entry, RowPerRecord
from xllm_jax.data.media import modalities
from xllm_jax.data.record import Mode, Record, Skipped
from xllm_jax.data.text.clip_tokenizer import ClipTokenizer

ABOUT, MEANS, DEVIATIONS = "about.json", "means.npy", "deviations.npy"


@dataclasses.dataclass(frozen=True)
class Latents:
    """A folder of latents, and what reads the words.

    Attributes:
      tokenizer: of the text encoder.
      about: seed, count and scaling.
      means, deviations: `[pictures, height, width, channels]` float16, on disk.
    """

    tokenizer: ClipTokenizer
    about: dict[str, Any]
    means: np.ndarray
    deviations: np.ndarray

    def words(self, ids: np.ndarray) -> np.ndarray:
        """The ids that stand for words, as of the tokenizer."""
        return self.tokenizer.words(ids)

    def piece(self, token: int) -> str:
        """What a token is written as."""
        return self.tokenizer.piece(token)


class Format(RowPerRecord[Entry, DescribedLatents, Latents]):
    """Latents and token ids of what their pictures show."""

    @property
    def media(self) -> tuple[str, ...]:
        """Modalities whose files a batch may hold."""
        return ()

    def load_resources(self) -> Latents:
        """The tokenizer and the latents.

        Raises:
          UserError: no folder of latents.
        """
        source = next(iter(self.data.sources.values()))
        folder = Path(self.data.root) / source.path
        if not (folder / ABOUT).is_file():
            hint = "Write it: xllm build-backbones --latents=runs"
            raise UserError("holds no latents", field=str(folder), hint=hint)
        about = bounded.read_json(folder / ABOUT)
        arrays = [np.load(folder / name, mmap_mode="r") for name in (MEANS, DEVIATIONS)]
        return Latents(ClipTokenizer(self.data.caption_tokenizer), about, *arrays)

    @property
    def row_tokens(self) -> int:
        """Tokens of a description."""
        return self.data.caption_length

    def zeros(self, rows: int, bucket: int = -1) -> DescribedLatents:
        """An empty batch, see `BatchFormat.zeros`."""
        shape = (rows, *self.resources.means.shape[1:])
        ids = np.zeros((rows, self.data.caption_length), np.int32)
        return DescribedLatents(ids, np.zeros(shape, np.float32), np.zeros(shape, np.float32))

    def entry(self, record: Record, mode: Mode) -> Entry:
        """The row of one record.

        Raises:
          UserError: the folder holds latents of another stream, or fewer.
        """
        seed, index = map(int, record.example.key.split("-"))
        held = self.resources.about
        if seed != held["seed"] or index >= held["count"]:
            what = f"is not among the {held['count']:,} pictures of stream {held['seed']}"
            hint = "Write the latents again: xllm build-backbones --latents=runs"
            raise UserError(what, field=record.example.key, hint=hint)
        return Entry(record)

    def fill(
        self,
        plan: BatchPlan[Entry],
        rows: slice,
        mode: Mode,
        load: modalities.Load = modalities.load,
    ) -> tuple[DescribedLatents, list[Skipped]]:
        """Reads some rows, see `BatchFormat.fill`; rows without a record are left out.

        Returns:
          (the latents and ids, nothing skipped).
        """
        keys = [entry.record.example.key for row in plan.rows[rows] for entry in row]
        asked = [scene_pictures.asked_for(key) for key in keys]
        said = [request.said if told else "" for request, told in asked]
        ids = self.resources.tokenizer.encode(said, self.data.caption_length)
        places = [int(key.split("-")[1]) for key in keys]
        means, deviations = (
            held[places].astype(np.float32)
            for held in (self.resources.means, self.resources.deviations)
        )
        return DescribedLatents(ids, means, deviations), []

    def padding(self, batch: DescribedLatents) -> dict[str, tuple[int, int]]:
        """{kind of place: (used, capacity)}: every row holds a picture."""
        return {"latents": (len(batch.means), len(batch.means))}
