"""Checksums of runs and caches of before, to compare with what they have written.

The text is shape, dtype and two integer sums of the values' bits, plain and weighted by place,
modulo 2^32. It misses what changes both by a multiple of 2^32, such as the sign of an even number
of values; nothing new is known by it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, SupportsInt

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from xllm_jax.core.types import Flat

if TYPE_CHECKING:
    import tensorstore

PLACE = 2654435761  # an odd factor: no two places of a leaf weigh the same
BLOCK = 1 << 22  # elements looked at at a time
WIDTHS = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def of_leaves(flat: Flat) -> dict[str, str]:
    """{path: checksum} of {path: array}; all are computed before the first is waited for."""
    started = {path: _start(leaf) for path, leaf in flat.items()}
    return {path: _written(flat[path].shape, flat[path].dtype, s) for path, s in started.items()}


def of_store(store: tensorstore.TensorStore, dtype: DTypeLike) -> str:
    """Checksum of a leaf on disk as it would be in memory.

    Args:
      store: of `checkpoint.open_leaves`.
      dtype: in which it would be kept.
    """
    dtype, shape = np.dtype(dtype), tuple(store.shape)
    return _written(shape, dtype, _sums(block.astype(dtype) for block in _blocks(store, shape)))


def _start(leaf: jax.Array | np.ndarray) -> Iterable[SupportsInt]:
    """The two sums of an array; on devices they need not be there yet."""
    if isinstance(leaf, jax.Array) and not _on_this_cpu(leaf):
        return _on_devices(leaf)
    flat = np.asarray(leaf).reshape(-1)
    return _sums(flat[start : start + BLOCK] for start in range(0, len(flat), BLOCK))


def _on_this_cpu(leaf: jax.Array) -> bool:
    """Whether NumPy reads the array as it is, which spares compiling for its shape."""
    cpu = all(device.platform == "cpu" for device in leaf.sharding.device_set)
    return cpu and leaf.is_fully_addressable


def _blocks(store: tensorstore.TensorStore, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    if not shape:
        yield np.asarray(store.read().result()).reshape(1)
        return
    rows = max(BLOCK // max(int(np.prod(shape[1:])), 1), 1)
    for start in range(0, shape[0], rows):
        end = min(start + rows, shape[0])
        yield np.asarray(store[start:end].read().result()).reshape(-1)


def _sums(blocks: Iterable[np.ndarray]) -> tuple[int, int]:
    """`_on_devices` of consecutive flat blocks."""
    count, plain, weighted = 0, 0, 0
    for block in blocks:
        bits = np.ascontiguousarray(block).view(WIDTHS[block.dtype.itemsize]).astype(np.uint32)
        places = np.arange(count, count + len(bits), dtype=np.uint32) * np.uint32(PLACE)
        plain += int(bits.sum(dtype=np.uint32))
        weighted += int((bits * (places + np.uint32(1))).sum(dtype=np.uint32))
        count += len(bits)
    return plain % 2**32, weighted % 2**32


@jax.jit
def _on_devices(leaf: jax.Array) -> tuple[jax.Array, jax.Array]:
    leaf = jax.device_put(leaf, jax.memory.Space.Device)  # it may be kept in the host's memory
    leaf = leaf.astype(np.uint8) if leaf.dtype == bool else leaf  # which has no bits to look at
    bits = jax.lax.bitcast_convert_type(leaf, WIDTHS[leaf.dtype.itemsize]).astype(np.uint32)
    place = jnp.ones(leaf.shape, np.uint32)
    for axis, stride in enumerate(_strides(leaf.shape)):  # flat, a sharded leaf would be gathered
        place += jax.lax.broadcasted_iota(np.uint32, leaf.shape, axis) * np.uint32(stride)
    return bits.sum(dtype=np.uint32), (bits * place).sum(dtype=np.uint32)


def _strides(shape: tuple[int, ...]) -> list[int]:
    """What one step along each axis adds to a value's weight."""
    return [math.prod(shape[axis + 1 :]) * PLACE % 2**32 for axis in range(len(shape))]


def _written(shape: tuple[int, ...], dtype: np.dtype, sums: Iterable[SupportsInt]) -> str:
    return f"{tuple(shape)} {dtype} {[int(value) for value in sums]}"
