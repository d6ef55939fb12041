"""A block of a stack that takes a few rows of each device after the other.

What stands between the products of a block then stays on the chip: with all rows of a large batch
at once it is written to the chip's main memory and read again. Numbers: docs/preflight.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from xllm_jax.core import mesh

USUAL = {"tpu": 8}  # where it is known to help, as docs/preflight.md tells

Array = jax.Array
M = TypeVar("M", bound=nn.Module)
Others = TypeVar("Others")


def scanned(
    block: M,
    run: Callable[[M, Array, Others], Array],
    x: Array,
    others: Others,
    chunk: int | None,
) -> Array:
    """What `run` makes of all rows, chunk by chunk where there are more than a chunk of them.

    Each chunk's outcome takes the place of its input: two arrays of all rows would leave the TPU
    compiler no room on the chip for the rest. Parameters that the mesh splits are gathered once,
    not for every chunk.

    Args:
      block: the module that `run` uses, within its compact method.
      run: (block, `x` and `others` of a chunk) to the new `x`.
      x: `[rows, ...]`.
      others: further arrays with rows first, read alone.
      chunk: as of `split`.
    """
    chunks = split(x.shape[0], chunk)
    if chunks[1] == 1 or block.is_initializing():
        return run(block, x, others)

    def step(block: M, whole: Array, given: tuple[Array, Others]) -> tuple[Array, None]:
        number, others = given
        rows = jax.lax.dynamic_index_in_dim(whole, number, keepdims=False)
        made = run(block, rows, others)
        return jax.lax.dynamic_update_index_in_dim(whole, made, number, 0), None

    scan = nn.scan(
        step,
        variable_broadcast="params",
        split_rngs={"params": False, "dropout": True},
        length=chunks[1],
    )

    def every(block: M, x: Array, others: Others) -> Array:
        return scan(block, x, (jnp.arange(chunks[1]), others))[0]

    gathering = nn.map_variables(every, "params", lambda tree: jax.tree.map(mesh.gathered, tree))
    parted = jax.tree.map(lambda y: part(y, chunks), (x, others))
    return join(gathering(block, *parted), chunks)


def split(rows: int, chunk: int | None) -> tuple[int, int]:
    """(devices that rows are split over, chunks of each of them).

    Args:
      rows: of a batch.
      chunk: rows of each device at a time, or the largest number below that divides them; 0 takes
        all at once. None takes those of USUAL, and all where only less than half as many divide.
    """
    found = jax.sharding.get_abstract_mesh()
    usual = USUAL.get(mesh.kind(), 0)
    devices = math.prod(found.shape.get(axis, 1) for axis in mesh.ROWS)
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
