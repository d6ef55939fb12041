"""A base read and written again leaf by leaf, some of its kernels changed on the way."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore
from jax.typing import DTypeLike

from xllm_jax.convert import run_import
from xllm_jax.core import checkpoint, rules
from xllm_jax.core.streamed_leaf import Blocks

Layer = int | tuple[()]
"""The index of a layer, `()` without layers."""

OWN = ("about.json", "params")  # written anew


def copied(path: str, store: tensorstore.TensorStore) -> Blocks:
    """A leaf as it is.

    Args:
      path: of the leaf.
      store: of `checkpoint.open_leaves`.
    """
    shape, dtype = tuple(store.shape), np.dtype(store.dtype.numpy_dtype)
    row = math.prod(shape[1:]) * dtype.itemsize
    rows = max(1, min(run_import.BLOCK // max(row, 1), shape[0] if shape else 1))

    def blocks() -> Iterator[np.ndarray]:
        if not shape:
            yield np.asarray(store.read().result())
            return
        for start in range(0, shape[0], rows):
            yield np.asarray(store[start : start + rows].read().result())

    return Blocks(path, shape, dtype, rows, blocks)


def computed(
    path: str,
    shape: tuple[int, ...],
    dtype: DTypeLike,
    layers: int,
    make: Callable[[Layer], np.ndarray],
) -> Blocks:
    """A leaf that is computed layer by layer.

    Args:
      path: of the leaf.
      shape, dtype: of the leaf.
      layers: how many axes stack layers, 0 or 1.
      make: the leaf's part of one layer.
    """

    def blocks() -> Iterator[np.ndarray]:
        if not layers:
            yield np.asarray(make(()), dtype)
            return
        for layer in range(shape[0]):
            yield np.asarray(make(layer), dtype)[None]

    rows = 1 if layers else (shape[0] if shape else 1)
    return Blocks(path, shape, np.dtype(dtype), rows, blocks)


def write(
    output: str | Path, source: Path, leaves: Mapping[str, Blocks], about: Mapping[str, Any]
) -> None:
    """Writes a base beside the further files of the one it was made from.

    Args:
      output: folder of the new base.
      source: folder of the old one.
      leaves: {path: leaf}.
      about: JSON kept with them.

    Raises:
      UserError: the output is there already, or a part of what is read.
      CannotWrite: there is no room.
    """
    run_import.check_output(output, source)
    run_import.check_new(output)
    run_import.check_room(output, sum(leaf.nbytes for leaf in leaves.values()))

    def finish(folder: Path) -> None:
        for entry in sorted(source.iterdir()):
            if entry.name in OWN or entry.name.startswith("."):
                continue
            if entry.is_dir():
                shutil.copytree(entry, folder / entry.name)
            else:
                shutil.copy(entry, folder / entry.name)

    checkpoint.save_base(output, rules.unflatten(leaves), about, finish)
