"""What the formats of drawn scenes have in common: a record a row, and no file of its own.

Records come from `sources/world_scenes.py`; an example's key alone says what is drawn.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import ClassVar

import jax
import numpy as np

from xllm_jax.core.batch import B
from xllm_jax.data.batching.batch_format import BatchPlan, Entry, R, RowPerRecord
from xllm_jax.data.example import Example
from xllm_jax.data.media import modalities
from xllm_jax.data.record import Mode, Record, Skipped
from xllm_jax.data.synthetic_world.requests import SHARES, Request, sample_request
from xllm_jax.data.synthetic_world.scene import generator
from xllm_jax.data.text.clip_tokenizer import ClipTokenizer

UNSAID = 0.1  # share of pictures without words, which guidance needs (arXiv 2207.12598)


class SceneRows(RowPerRecord[Entry, B, R]):
    """Rows that are made from the keys of their examples.

    Attributes:
      kind: of place that every row fills.
    """

    kind: ClassVar[str] = "image"

    @property
    def media(self) -> tuple[str, ...]:
        """Modalities whose files a batch may hold."""
        return ("image",) if self.kind == "image" else ()

    def entry(self, record: Record, mode: Mode) -> Entry:
        """The row of one record."""
        return Entry(record)

    @abc.abstractmethod
    def made(self, examples: Sequence[Example]) -> B:
        """The batch of some examples, a row each."""

    def fill(
        self,
        plan: BatchPlan[Entry],
        rows: slice,
        mode: Mode,
        load: modalities.Load = modalities.load,
    ) -> tuple[B, list[Skipped]]:
        """Makes some rows, see `BatchFormat.fill`; rows without a record are left out.

        Returns:
          (the batch, nothing skipped).
        """
        return self.made([entry.record.example for row in plan.rows[rows] for entry in row]), []

    def padding(self, batch: B) -> dict[str, tuple[int, int]]:
        """{kind of place: (used, capacity)}: every row is used."""
        count = len(jax.tree.leaves(batch)[0])
        return {self.kind: (count, count)}


class DescribedRows(SceneRows[B, R]):
    """Rows beside the words for them, as a text encoder reads these."""

    @property
    def row_tokens(self) -> int:
        """Tokens of a description."""
        return self.data.caption_length

    def no_words(self, rows: int) -> np.ndarray:
        """`[rows, tokens]` int32 of descriptions that are not there."""
        return np.zeros((rows, self.data.caption_length), np.int32)

    def words(self, tokenizer: ClipTokenizer, asked: Sequence[tuple[Request, bool]]) -> np.ndarray:
        """`[rows, tokens]` int32 of requests, or of nothing where the words are not told.

        Args:
          tokenizer: of the text encoder.
          asked: see `asked_for`.
        """
        said = [request.said if told else "" for request, told in asked]
        return tokenizer.encode(said, self.data.caption_length)


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
