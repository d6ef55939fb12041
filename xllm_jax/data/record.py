"""Record: an example at its place in the endless stream, with the randomness that belongs to it."""

from __future__ import annotations

import dataclasses
import zlib

import numpy as np

from xllm_jax.core.errors import UserError
from xllm_jax.data.example import Example

PROMPT, MEDIA = 0, 1  # purposes of a record's generators; one never disturbs the other


class DoesNotFit(UserError):
    """A readable record that is too long for its bucket."""


@dataclasses.dataclass(frozen=True)
class Record:
    """One draw of one example.

    Attributes:
      example: what was drawn.
      source: name of its data set.
      epoch: how often its data set had been read before.
      index: its place in the data set.
      seed: of the run.
      bucket: its length bucket, an index into `Data.frames`.
    """

    example: Example
    source: str = ""
    epoch: int = 0
    index: int = 0
    seed: int = 0
    bucket: int = 0

    def generator(self, purpose: int, part: int = 0) -> np.random.Generator:
        """A fresh generator that depends on the record alone, never on the worker or the order.

        Args:
          purpose: PROMPT or MEDIA.
          part: which file of the record.
        """
        name = zlib.crc32(self.source.encode())
        return np.random.default_rng([self.seed, name, self.epoch, self.index, purpose, part])


@dataclasses.dataclass(frozen=True)
class Mode:
    """What a batch is for.

    Attributes:
      train: random augmentation, and long text is cut instead of refused.
      cut: outside training, too, long text is cut and a record that does not fit is left out.
    """

    train: bool = True
    cut: bool = False

    @property
    def strict(self) -> bool:
        """Whether a record that is too long is an error."""
        return not (self.train or self.cut)


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A record that a batch lacks, and why; `bad` says that its files could not be used."""

    key: str
    reason: str
    bad: bool = False
    file: str = ""
