"""Speech that has been through encoder and CIF already: `.npy` files of one vector a token.

The reference repository trains on such files instead of audio. They are read and checked here; no
interface takes them as input so far, so a prompt refuses the modality 'cif' by name. Train on the
audio itself (the option `audio` of `sources/reference.py`) until one does.
"""

from __future__ import annotations

import os

import numpy as np

from xllm_jax.core.errors import UserError
from xllm_jax.data import files

WIDTH = 512  # of the speech encoder and CIF


def load(path: str | os.PathLike, width: int = WIDTH) -> np.ndarray:
    """Reads one utterance: `[tokens, width]` float32.

    Raises:
      UserError: the file is missing, not `.npy`, of another shape or type, empty or not finite.
    """
    source = files.source(path)
    try:
        values = np.load(source, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        what = f"cannot be read as features ({error})"
        raise UserError(what, field=str(path), mend="Compute it again") from error
    if not isinstance(values, np.ndarray) or values.ndim != 2 or values.shape[1] != width:
        shape = getattr(values, "shape", "none")
        raise UserError(f"has the shape {shape}, not (tokens, {width})", field=str(path))
    if not len(values):
        raise UserError("holds no token", field=str(path), mend="Leave it out")
    if values.dtype.kind != "f" or not np.isfinite(values).all():
        raise UserError("holds values that are not finite numbers", field=str(path))
    return values.astype(np.float32)
