"""Writing lists of picked records, which `data/sources/selection.py` reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from xllm_jax.core import atomic, disk
from xllm_jax.core.stage import Source
from xllm_jax.data.sources import selection


def write(
    folder: str,
    split: str,
    sources: Mapping[str, Source],
    picked: np.ndarray,
    instructions: Sequence[str] = (),
) -> None:
    """Writes one split, every file whole or not at all.

    Args:
      folder: for the list, made if needed.
      split: 'train', 'val' or 'test'.
      sources: {name: source}, paths relative to the current folder.
      picked: `[records, 3]` int64 (source, record, instruction or -1).
      instructions: that `picked` speaks of.
    """
    root = Path(folder)
    disk.make_folder(root)
    atomic.write_array(root / f"{split}.npy", np.ascontiguousarray(picked, np.int64))
    described = selection.described(sources, root)
    about = {"sources": described, "instructions": list(instructions)}
    atomic.write_json(root / selection.FILE, about)
