"""The format of described latents: what an autoencoder made of the world's pictures, once.

    DIR/about.json        of which scenes, by which scaling
    DIR/means.npy         [pictures, height, width, channels] float16
    DIR/deviations.npy    the same of the posterior's deviation

`feature_cache/scene_latents.py` writes the folder, and the source's path says where it is. Record i
of the stream is picture i; its words are drawn as for `scene_pictures`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xllm_jax.core import bounded
from xllm_jax.core.batch import DescribedLatents
from xllm_jax.core.errors import UserError
from xllm_jax.data.batching import scene_rows
from xllm_jax.data.batching.batch_format import Entry
from xllm_jax.data.example import Example
from xllm_jax.data.record import Mode, Record
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


class Format(scene_rows.DescribedRows[DescribedLatents, Latents]):
    """Latents and token ids of what their pictures show."""

    kind = "latents"

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

    def zeros(self, rows: int, bucket: int = -1) -> DescribedLatents:
        """An empty batch, see `BatchFormat.zeros`."""
        shape = (rows, *self.resources.means.shape[1:])
        ids = self.no_words(rows)
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

    def made(self, examples: Sequence[Example]) -> DescribedLatents:
        """The latents of some examples, and their ids."""
        asked = [scene_rows.asked_for(one.key) for one in examples]
        places = [int(one.key.split("-")[1]) for one in examples]
        means, deviations = (
            held[places].astype(np.float32)
            for held in (self.resources.means, self.resources.deviations)
        )
        return DescribedLatents(self.words(self.resources.tokenizer, asked), means, deviations)
