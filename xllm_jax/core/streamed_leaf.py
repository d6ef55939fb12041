"""Leaves that are written piece by piece, so that a base larger than memory can be converted."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator

import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from xllm_jax.core import disk
from xllm_jax.core.errors import CannotWrite, UserError

UNCOMMITTED = 1 << 26  # bytes


@dataclasses.dataclass(frozen=True)
class Blocks:
    """A leaf that `save_base` asks for piece by piece, so that it is never held whole.

    Attributes:
      path: of the leaf, for errors.
      shape, dtype: of the whole leaf.
      rows: length of a block (and of a chunk on disk) along axis 0; the last may be shorter.
      blocks: yields the consecutive blocks; one array without axes for a scalar.
    """

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    rows: int
    blocks: Callable[[], Iterator[np.ndarray]]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole leaf."""
        return self.size * self.dtype.itemsize


class BlocksHandler(ocp.type_handlers.NumpyHandler):
    """Writes `Blocks` where orbax writes a NumPy array, in chunks of one block, one after another.

    Orbax has no public way to write a leaf in parts. The metadata are those of a NumPy array, so
    that what is written is an ordinary orbax checkpoint. Every commit waits for the disk, and
    commits of one moment are one: no more than UNCOMMITTED bytes of blocks wait for theirs. The
    first error is kept in `failure` and ends the writing: raised here, in a thread of orbax, it
    would be printed with its traceback.
    """

    def __init__(self):
        super().__init__(deepcopy_host_arrays=False)
        self.failure: Exception | None = None
        self._turn = asyncio.Lock()
        self._waiting: list[tuple[int, tensorstore.WriteFutures]] = []

    async def _open_and_write(
        self, value: Blocks, tspec: dict, ts_context: tensorstore.Context
    ) -> None:
        if value.shape:
            tspec["metadata"]["chunks"] = [value.rows, *value.shape[1:]]
        spec = tensorstore.Spec(tspec)
        opening = tensorstore.open(spec, create=True, open=True, context=ts_context)
        try:
            async with self._turn:
                written = [] if self.failure else await self._write_blocks(value, await opening)
            for future in written:
                await future
        except UserError as error:
            self.failure = self.failure or error
        except (ValueError, OSError) as error:  # what tensorstore raises for a full disk
            self.failure = self.failure or full(value.path, error)

    async def _write_blocks(
        self, value: Blocks, store: tensorstore.TensorStore
    ) -> list[tensorstore.WriteFutures]:
        """Begins to write every block; returns what to wait for."""
        written, start = [], 0
        for block in value.blocks():
            stop = start + (block.shape[0] if value.shape else 0)
            written.append((store[start:stop] if value.shape else store).write(block))
            start = stop
            self._waiting = [one for one in self._waiting if not one[1].done()]
            self._waiting.append((block.nbytes, written[-1]))
            if sum(size for size, _ in self._waiting) > UNCOMMITTED:
                await asyncio.wait([asyncio.ensure_future(_end(one)) for _, one in self._waiting])
                for future in written:  # all have ended: a full disk is met here, not at the end
                    await future
                if self.failure:
                    break
        return written


async def _end(written: tensorstore.WriteFutures) -> None:
    """Waits; an error is that of the leaf, which waits as well."""
    with contextlib.suppress(ValueError, OSError):
        await written


def full(path: str, error: Exception) -> CannotWrite:
    """The error about a leaf that the disk has no room for."""
    found = disk.failure(error)
    reason = found[1] if found else " ".join(str(error).split())[:200]
    return CannotWrite(path, reason, "Nothing was left behind")
