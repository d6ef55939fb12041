"""BatchFormat: how examples become the arrays of a step.

A file of this folder with a class `Format` is a batch format, and `data.batch_format` names the
file; a format of another package is 'package.module:Class'. Planning reads text only and is the
same on every host: it decides for the whole global batch which example stands in which row. Filling
opens the media of one host's rows.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Collection, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import jax

from xllm_jax.core import lookup
from xllm_jax.core.batch import B, Batch
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Data
from xllm_jax.data.example import Example
from xllm_jax.data.media import modalities
from xllm_jax.data.record import DoesNotFit, Mode, Record, Skipped

PACKAGE, FIELD = "xllm_jax.data.batching", "data.batch_format"


@dataclasses.dataclass(frozen=True)
class Entry:
    """A record that has a place in a row, and what the format has made of its text."""

    record: Record

    @property
    def supervised(self) -> int:
        """How many tokens are learnt from it; 1 where the whole record is what is learnt."""
        return 1

    @property
    def cut(self) -> int:
        """Tokens that its long text has lost."""
        return 0


E = TypeVar("E", bound=Entry)
R = TypeVar("R")  # resources


@dataclasses.dataclass(frozen=True)
class BatchPlan(Generic[E]):
    """What stands in the rows of a global batch.

    Attributes:
      rows: the entries of each row, in order; a row without any is padding.
      skipped: records that were left out.
      bucket: the length bucket that holds all of them, an index into `data.frames`.
    """

    rows: tuple[tuple[E, ...], ...]
    skipped: tuple[Skipped, ...] = ()
    bucket: int = -1

    def supervised(self) -> int:
        """What is learnt from all entries, in tokens or records."""
        return sum(entry.supervised for row in self.rows for entry in row)

    def cut(self) -> int:
        """Tokens that long text has lost."""
        return sum(entry.cut for row in self.rows for entry in row)

    def members(self, rows: slice) -> list[tuple[int, int, Record]]:
        """(row, segment, record) of every entry in some rows.

        Rows are counted from the first of `rows`, the segments of a row from 1.
        """
        return [
            (number, segment, entry.record)
            for number, row in enumerate(self.rows[rows])
            for segment, entry in enumerate(row, start=1)
        ]


class BatchFormat(abc.ABC, Generic[E, B, R]):
    """The batches of a stage: one micro-batch is `data.examples` records in `rows` rows.

    Attributes:
      packs: whether several examples may share a row; then there are `data.rows` rows.
      caches: whether a batch may hold cached features instead of media.
      data: settings of the stage.
    """

    packs: ClassVar[bool] = False
    caches: ClassVar[bool] = False

    def __init__(self, data: Data):
        self.data = data

    @property
    def media(self) -> Collection[str]:
        """Modalities whose files a batch may hold."""
        return self.data.items

    @functools.cached_property
    def resources(self) -> R:
        """What planning and filling read besides the settings, loaded at the first use."""
        return self.load_resources()

    @abc.abstractmethod
    def load_resources(self) -> R:
        """Loads tokenizer, vocabulary and the like.

        Raises:
          UserError: a file that the data names is missing, or settings contradict the format.
        """

    @property
    def rows_field(self) -> str:
        """The field of Data that counts rows."""
        return "rows" if self.packs else "examples"

    @property
    def rows(self) -> int:
        """Rows of a micro-batch over all hosts."""
        return getattr(self.data, self.rows_field)

    @property
    @abc.abstractmethod
    def row_tokens(self) -> int:
        """Positions of a row that are paid for: tokens, characters, word pieces or patches."""

    @property
    def bucketed(self) -> bool:
        """Whether batches differ in length: each holds records of one length bucket."""
        return False

    def bucket(self, example: Example) -> int:
        """Length bucket of an example, an index into `data.frames`."""
        return 0

    @property
    def programs(self) -> int:
        """How many shapes batches come in, which is how often a step is compiled."""
        return len(self.data.frames) if self.bucketed else 1

    @abc.abstractmethod
    def zeros(self, rows: int, bucket: int = -1) -> B:
        """NumPy arrays of a batch without any example; reads no resources.

        Args:
          rows: how many.
          bucket: length bucket.
        """

    def shapes(self) -> B:
        """A micro-batch of `jax.ShapeDtypeStruct`, at the last length bucket."""
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((self.rows, *x.shape[1:]), x.dtype), self.zeros(0)
        )

    @abc.abstractmethod
    def plan(self, records: Sequence[Record], mode: Mode) -> BatchPlan[E]:
        """Places the records of one global batch; those that it leaves out are in `skipped`."""

    @abc.abstractmethod
    def batches(self, records: Sequence[Record], mode: Mode) -> list[BatchPlan[E]]:
        """Plans that hold every record exactly once, in order.

        Raises:
          DoesNotFit: a record that no row can hold, where `mode` is strict.
        """

    @abc.abstractmethod
    def fill(
        self,
        plan: BatchPlan[E],
        rows: slice,
        mode: Mode,
        load: modalities.Load = modalities.load,
    ) -> tuple[B, list[Skipped]]:
        """Opens the media of some rows and writes their arrays.

        Args:
          plan: of the global batch.
          rows: those of this host.
          mode: what the batch is for.
          load: opens a file.

        Returns:
          (NumPy arrays of these rows, the records whose files could not be read; their places
          stay empty).
        """

    @abc.abstractmethod
    def padding(self, batch: B) -> dict[str, tuple[int, int]]:
        """{kind of place: (used, capacity)} of a batch."""


class RowPerRecord(BatchFormat[E, B, R]):
    """A format that gives every record a row of its own."""

    @abc.abstractmethod
    def entry(self, record: Record, mode: Mode) -> E:
        """The row of one record.

        Raises:
          DoesNotFit: a good record that is too long.
          UserError: a record that the format cannot use.
        """

    def plan(self, records: Sequence[Record], mode: Mode) -> BatchPlan[E]:
        """One row per record, in order; the bucket is the longest that a record belongs to."""
        found: list[E] = []
        skipped: list[Skipped] = []
        for record in records:
            try:
                found.append(self.entry(record, mode))
            except UserError as error:
                bad = not isinstance(error, DoesNotFit)
                skipped.append(Skipped(record.example.key, error.what, bad))
        bucket = max((entry.record.bucket for entry in found), default=0)
        empty = [()] * (self.data.examples - len(found))
        return BatchPlan((*((entry,) for entry in found), *empty), tuple(skipped), bucket)

    def batches(self, records: Sequence[Record], mode: Mode) -> list[BatchPlan[E]]:
        """Plans that hold every record exactly once, in order; the last is padded."""
        size = self.data.examples
        starts = range(0, len(records), size)
        return [self.plan(records[start : start + size], mode) for start in starts]


def find(data: Data) -> BatchFormat[Any, Batch, Any]:
    """The batch format that the data names.

    Raises:
      UserError: there is none of that name.
    """
    name = data.batch_format
    if ":" in name:
        return lookup.imported(name, FIELD)[1](data)
    return lookup.module(PACKAGE, name, FIELD, needs="Format").Format(data)
