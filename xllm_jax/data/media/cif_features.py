"""Speech that has been through encoder and CIF already: `.npy` files of one vector a token.

The reference repository trains on such files instead of audio. With `data.speech_features='cif'`
they fill the prompt's slots of speech, and the model goes on behind its CIF (`media.py`); in a run
without it an example that has one is left out by name.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import BinaryIO, TypeVar

import numpy as np

from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Data
from xllm_jax.data.media import formats, paths, speech
from xllm_jax.data.media.modality import Modality

T = TypeVar("T")

MOST_BYTES = 1 << 28  # of an array
WIDTH = 512  # of the speech encoder and CIF
MEND = "Give .npy files of CIF features, or sounds without data.speech_features"


def count(path: str | os.PathLike) -> int:
    """Vectors of one utterance by the head of its file, which `load` may still refuse.

    Raises:
      UserError: the file is missing, or not `.npy`.
    """

    shape = _opened(path, _shape_and_bytes)[0]
    return shape[0] if shape else 0


def _shape_and_bytes(file: BinaryIO) -> tuple[tuple[int, ...], int]:
    """What the head of a `.npy` file says: the array's shape and bytes."""
    first = np.lib.format.read_magic(file) == (1, 0)
    read = np.lib.format.read_array_header_1_0
    shape, _, dtype = (read if first else np.lib.format.read_array_header_2_0)(file)
    if not all(type(length) is int and 0 <= length < 1 << 63 for length in shape):
        raise ValueError(f"no array has the shape {str(shape)[:80]}")
    return shape, math.prod(shape) * dtype.itemsize


def _array(file: BinaryIO) -> np.ndarray:
    """The array of a `.npy` file, which holds what its head says, and not too much."""
    _, wanted = _shape_and_bytes(file)
    start = file.tell()
    there = file.seek(0, os.SEEK_END) - start
    if wanted > min(there, MOST_BYTES):
        raise ValueError(f"its array of {wanted:,} bytes does not fit into {there:,}")
    file.seek(0)
    return np.lib.format.read_array(file)


def load(path: str | os.PathLike, width: int = WIDTH) -> np.ndarray:
    """Reads one utterance: `[tokens, width]` float32.

    Raises:
      UserError: the file is missing, not `.npy`, of another shape or type, empty or not finite.
    """
    values = _opened(path, _array)
    if values.ndim != 2 or values.shape[1] != width:
        raise UserError(f"has the shape {values.shape}, not (tokens, {width})", field=str(path))
    if not len(values):
        raise UserError("holds no token", field=str(path), hint="Leave it out")
    if values.dtype.kind != "f" or not np.isfinite(values).all():
        raise UserError("holds values that are not finite numbers", field=str(path))
    return values.astype(np.float32)


def _opened(path: str | os.PathLike, read: Callable[[BinaryIO], T]) -> T:
    """What `read` makes of the file; it never unpickles.

    Raises:
      UserError: the file is missing, or not `.npy`.
    """
    source = paths.source(path)
    formats.check(path, "cif")
    try:
        with open(source, "rb") if isinstance(source, str) else source as file:
            return read(file)
    except UserError:
        raise
    except Exception as error:  # what NumPy raises on damaged files has no bounds
        what = f"cannot be read as features ({formats.reason(error)})"
        raise UserError(what, field=str(path), hint=MEND) from error


def _load(path: str, data: Data, rng: np.random.Generator | None) -> np.ndarray:
    most, width = _shape(data)
    # Our own CIF drops tokens beyond its capacity, too.
    return load(path, width)[None, :most]


def _shape(data: Data) -> tuple[int, ...]:
    return data.embeddings["speech"], data.speech_width


MODALITY = Modality(
    load=_load,
    read=load,
    shape=_shape,
    fields=("speech_features", "speech_width"),
    bound="data.embeddings.speech",
    count=count,
    slot="steps",
    tasks=speech.MODALITY.tasks,
    view="vectors",
    contents="CIF features",
    padding=speech.MODALITY.padding,
)
