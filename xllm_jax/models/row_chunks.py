"""A block of a stack that takes a few rows of each device after the other.

What stands between the products of a block then stays on the chip: with all rows of a large batch
at once it is written to the chip's main memory and read again. Numbers: docs/preflight.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import jax
from flax import linen as nn

from xllm_jax.core import mesh

USUAL = {"tpu": 8}  # where it is known to help, as docs/preflight.md tells

Array = jax.Array
M = TypeVar("M", bound=nn.Module)
Rows = TypeVar("Rows")  # arrays with rows first
Made = TypeVar("Made")


def scanned(block: M, run: Callable[[M, Rows], Made], rows: Rows, chunk: int | None) -> Made:
    """What `run` makes of all rows, chunk by chunk where there are more than a chunk of them.

    Parameters that the mesh splits are gathered once, not for every chunk.

    Args:
      block: the module that `run` uses, within its compact method.
      run: (block, rows of a chunk) to arrays with rows first.
      rows: arrays `[rows, ...]`.
      chunk: as of `split`.
    """
    chunks = split(jax.tree.leaves(rows)[0].shape[0], chunk)
    if chunks[1] == 1 or block.is_initializing():
        return run(block, rows)

    def step(block: M, carry: tuple[()], rows: Rows) -> tuple[tuple[()], Made]:
        return carry, run(block, rows)

    scan = nn.scan(
        step,
        variable_broadcast="params",
        split_rngs={"params": False, "dropout": True},
        length=chunks[1],
    )

    def every(block: M, rows: Rows) -> Made:
        return scan(block, (), rows)[1]

    parted = jax.tree.map(lambda x: part(x, chunks), rows)
    gathering = nn.map_variables(every, "params", lambda tree: jax.tree.map(mesh.gathered, tree))
    return jax.tree.map(lambda x: join(x, chunks), gathering(block, parted))


def split(rows: int, chunk: int | None) -> tuple[int, int]:
    """(devices that rows are split over, chunks of each of them).

    Args:
      rows: of a batch.
      chunk: rows of each device at a time, or the largest number below that divides them; 0 takes
        all at once. None takes those of USUAL, and all where only less than half as many divide.
    """
    found = jax.sharding.get_abstract_mesh()
    usual = USUAL.get(getattr(found.abstract_device, "platform", ""), 0)
    shape = found.shape
    devices = math.prod(shape.get(axis, 1) for axis in mesh.ROWS)
    devices = devices if rows % devices == 0 else 1
    own = rows // devices
    most = min((usual if chunk is None else chunk) or own, own)
    size = next(n for n in range(most, 0, -1) if own % n == 0)
    if chunk is None and size < min(usual, own) / 2:
        size = own
    return devices, own // size


def part(x: Array, chunks: tuple[int, int]) -> Array:
    """`[rows, ...]` to `[chunks, rows of a chunk, ...]`; every device keeps its own rows."""
    devices, count = chunks
    x = x.reshape(devices, count, -1, *x.shape[1:]).swapaxes(0, 1)
    return mesh.constrain(x.reshape(count, -1, *x.shape[3:]), None, mesh.ROWS)


def join(x: Array, chunks: tuple[int, int]) -> Array:
    """The inverse of `part`."""
    devices, count = chunks
    x = x.reshape(count, devices, -1, *x.shape[2:]).swapaxes(0, 1)
    return mesh.constrain_rows(x.reshape(-1, *x.shape[3:]))
