"""Fingerprints: the short text by which a parameter is known, and the identity of a tree of them.

A fingerprint is shape, dtype and two exact integer checksums of the values' bits. They are computed
where the array lies, so that a sharded one is not gathered on the host, or block by block from
disk, so that a parameter that nobody needs in memory is not brought there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from xllm_jax.core import rules

PLACE = 2654435761  # an odd factor: no two places of a leaf weigh the same
BLOCK = 1 << 22  # elements looked at at a time
WIDTHS = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def of_tree(tree: Mapping[str, Any]) -> dict[str, str]:
    """{path: fingerprint} of a tree of arrays."""
    return {path: of_array(leaf) for path, leaf in rules.flatten(tree).items()}


def of_array(leaf: Any) -> str:
    """Fingerprint of an array on devices or on the host."""
    if isinstance(leaf, jax.Array) and not _on_this_cpu(leaf):
        return _written(leaf.shape, leaf.dtype, _on_devices(leaf))
    flat = np.asarray(leaf).reshape(-1)
    blocks = (flat[start : start + BLOCK] for start in range(0, len(flat), BLOCK))
    return _written(leaf.shape, leaf.dtype, _sums(blocks))


def of_store(store: Any, dtype: Any) -> str:
    """Fingerprint of a leaf on disk as it would be in memory.

    Args:
      store: of `checkpoint.open_leaves`.
      dtype: in which it would be kept.
    """
    dtype, shape = np.dtype(dtype), tuple(store.shape)
    return _written(shape, dtype, _sums(block.astype(dtype) for block in _blocks(store, shape)))


def combined(fingerprints: Mapping[str, str]) -> str:
    """The identity of a tree (hex, 16 digits) from its leaves' fingerprints, in any order."""
    digest = hashlib.sha256()
    for path in sorted(fingerprints, key=lambda path: path.split("/")):
        digest.update(f"{path} {fingerprints[path]}\n".encode())
    return digest.hexdigest()[:16]


def _on_this_cpu(leaf: jax.Array) -> bool:
    """Whether NumPy reads the array as it is, which spares compiling for its shape."""
    cpu = all(device.platform == "cpu" for device in leaf.sharding.device_set)
    return cpu and leaf.is_fully_addressable


def _blocks(store: Any, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
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
    width = WIDTHS[leaf.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(leaf, width).astype(np.uint32).reshape(-1)
    place = jax.lax.iota(np.uint32, bits.shape[0]) * np.uint32(PLACE) + np.uint32(1)
    return bits.sum(dtype=np.uint32), (bits * place).sum(dtype=np.uint32)


def _written(shape: tuple[int, ...], dtype: Any, sums: Iterable[Any]) -> str:
    return f"{tuple(shape)} {dtype} {[int(value) for value in sums]}"
