"""Checksums: the text by which a parameter is known, and the identity of a tree of them.

A leaf's text is its shape, its dtype and a SHA-256 of its bytes: of the digests of its blocks,
which are whole rows in order, so that it is the same for every sharding. Blocks are hashed by
threads where the array lies: every host fetches and hashes its share of an array that the hosts
hold together, and a leaf on disk is read block by block and never brought into memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from xllm_jax.core import older_checksum, parallel, rules
from xllm_jax.core.types import Flat, Params

if TYPE_CHECKING:
    import tensorstore

Block = jax.Array | np.ndarray | None  # None where another host hashes it

NAME = "sha256:"
BLOCK = 1 << 24  # bytes of a block of rows; a part of what the text says, as the hash is
THREADS = min(os.cpu_count() or 1, 32)
DIGEST = hashlib.sha256().digest_size
OLDER = (
    "has checksums that miss some changes, such as the sign of every value or a factor of two. It "
    "agrees by those; what is written from here on has SHA-256 of every byte"
)


def is_older(text: str) -> bool:
    """Whether a checksum or identity is of the time before every byte was hashed."""
    return NAME not in text


def warn(what: str) -> None:
    """One line about something older that was compared, on the first host."""
    if not jax.process_index():
        print(f"{what} {OLDER}", file=sys.stderr, flush=True)


def identity(tree: Params, older: bool = False) -> str:
    """Hash of a parameter tree: paths, shapes, dtypes and every value's bytes.

    Args:
      tree: of arrays.
      older: as runs were known before, see `older_checksum`.
    """
    return combined(of_tree(tree, older))


def of_tree(tree: Params, older: bool = False) -> dict[str, str]:
    """{path: checksum} of a tree of arrays; `older` see `identity`."""
    return of_leaves(rules.flatten(tree), older)


def of_leaves(flat: Flat, older: bool = False) -> dict[str, str]:
    """{path: checksum} of {path: array}; every host of arrays that hosts share must call it.

    Args:
      flat: arrays of JAX or NumPy.
      older: see `identity`.
    """
    if older:
        return older_checksum.of_leaves(flat)
    digests: dict[str, list[bytes]] = {path: [] for path in flat}
    with ThreadPoolExecutor(THREADS) as pool:
        blocks = _blocks_of_leaves(flat)
        for path, digest in parallel.ahead(pool, _hashed, blocks, 2 * THREADS):
            digests[path].append(digest)
    _exchange({path: digests[path] for path in sorted(flat) if _shared(flat[path])})
    return {path: _written(flat[path].shape, flat[path].dtype, digests[path]) for path in flat}


def of_store(store: tensorstore.TensorStore, dtype: DTypeLike, older: bool = False) -> str:
    """Checksum of a leaf on disk as it would be in memory.

    Args:
      store: of `checkpoint.open_leaves`.
      dtype: in which it would be kept.
      older: see `identity`.
    """
    if older:
        return older_checksum.of_store(store, dtype)
    dtype, shape = np.dtype(dtype), tuple(store.shape)
    with ThreadPoolExecutor(THREADS) as pool:
        blocks = (("", block) for block in _blocks_of_store(store, dtype))
        found = list(parallel.ahead(pool, _hashed, blocks, 2 * THREADS))
    return _written(shape, dtype, [digest for _, digest in found])


def of_json(value: object) -> str:
    """Hash of plain data, the same before and after it was a JSON file (hex, 16 digits)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def combined(checksums: Mapping[str, str]) -> str:
    """The identity of a tree from its leaves' checksums, in any order."""
    digest = hashlib.sha256()
    for path in sorted(checksums, key=lambda path: path.split("/")):
        digest.update(f"{path} {checksums[path]}\n".encode())
    if any(map(is_older, checksums.values())):
        return digest.hexdigest()[:16]
    return NAME + digest.hexdigest()


def _blocks_of_leaves(flat: Flat) -> Iterator[tuple[str, Block]]:
    """(path, block) of all leaves in order; None where another host hashes the block."""
    for path, leaf in flat.items():
        if isinstance(leaf, jax.Array) and not _on_this_cpu(leaf):
            yield from ((path, block) for block in _blocks_on_devices(leaf))
        else:
            values = np.asarray(leaf)
            yield from ((path, values[rows]) for rows in _rows(values.shape, values.itemsize))


def _on_this_cpu(leaf: jax.Array) -> bool:
    """Whether NumPy reads the array as it is, which spares compiling for its shape."""
    cpu = all(device.platform == "cpu" for device in leaf.sharding.device_set)
    return cpu and leaf.is_fully_addressable


def _shared(leaf: jax.Array | np.ndarray) -> bool:
    return isinstance(leaf, jax.Array) and not leaf.is_fully_addressable


def _rows(shape: tuple[int, ...], itemsize: int) -> Iterator[Any]:
    """The indices of a leaf's blocks: whole rows of about `BLOCK` bytes."""
    if not shape:
        yield ()
        return
    row = max(int(np.prod(shape[1:], dtype=np.int64)) * itemsize, 1)
    rows = max(BLOCK // row, 1)
    yield from (slice(start, min(start + rows, shape[0])) for start in range(0, shape[0], rows))


def _blocks_on_devices(leaf: jax.Array) -> Iterator[jax.Array | None]:
    """Copies of a leaf's blocks, whole on every device that has a part of the leaf."""
    sharding = leaf.sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec())
    else:
        sharding = jax.sharding.SingleDeviceSharding(min(sharding.device_set, key=lambda d: d.id))
    cut = jax.jit(_cut, static_argnums=2, out_shardings=sharding)
    for number, rows in enumerate(_rows(leaf.shape, leaf.dtype.itemsize)):
        start, size = (rows.start, rows.stop - rows.start) if leaf.ndim else (0, 1)
        block = cut(leaf, start, size)
        ours = leaf.is_fully_addressable or number % jax.process_count() == jax.process_index()
        yield block if ours else None


def _cut(leaf: jax.Array, start: int, size: int) -> jax.Array:
    leaf = jax.device_put(leaf, jax.memory.Space.Device)  # it may be kept in the host's memory
    return jax.lax.dynamic_slice_in_dim(leaf, start, size) if leaf.ndim else leaf


def _blocks_of_store(store: Any, dtype: np.dtype) -> Iterator[np.ndarray]:
    """As `_rows` cuts a leaf; a chunk of the file, which may hold many blocks, is read at once."""
    shape = tuple(store.shape)
    if not shape:
        yield np.asarray(store.read().result()).astype(dtype)
        return
    blocks = list(_rows(shape, dtype.itemsize))
    chunk = store.chunk_layout.read_chunk.shape[0]
    at_once = -(-chunk // max(blocks[0].stop, 1)) if blocks else 1
    for first in range(0, len(blocks), at_once):
        group = blocks[first : first + at_once]
        start = group[0].start
        values = np.asarray(store[start : group[-1].stop].read().result())
        for rows in group:
            yield values[rows.start - start : rows.stop - start].astype(dtype, copy=False)


def _hashed(entry: tuple[str, Block]) -> tuple[str, bytes]:
    """(path, digest of a block); zeros for what another host hashes."""
    path, block = entry
    if block is None:
        return path, bytes(DIGEST)
    values = np.ascontiguousarray(np.asarray(block)).reshape(-1)
    return path, hashlib.sha256(values.view(np.uint8).data).digest()


def _exchange(digests: Mapping[str, list[bytes]]) -> None:
    """Fills in, for every leaf that hosts share, the digests that the other hosts have made."""
    rows = [digest for found in digests.values() for digest in found]
    if not rows:
        return
    mine = np.frombuffer(b"".join(rows), np.uint8).reshape(-1, DIGEST)
    whole = iter(np.asarray(multihost_utils.process_allgather(mine)).max(0))
    for found in digests.values():
        found[:] = [next(whole).tobytes() for _ in found]


def _written(shape: tuple[int, ...], dtype: np.dtype, digests: list[bytes]) -> str:
    return f"{tuple(shape)} {dtype} {NAME}{hashlib.sha256(b''.join(digests)).hexdigest()}"
