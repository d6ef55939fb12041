"""What a checkpoint's file says of one tensor before it is read."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from xllm_jax.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class Header:
    """Shape and dtype of a tensor that has not been read."""

    shape: tuple[int, ...]
    dtype: np.dtype


def known(header: Header | None, path: Path, name: str) -> Header:
    """The header of a tensor that can be read.

    Args:
      header: None where it cannot.
      path, name: of the tensor.

    Raises:
      UserError: it cannot.
    """
    if header is None:
        raise UserError(
            "is of a dtype that NumPy cannot hold, or has more elements than numbers",
            field=f"{path}: {name}",
            hint="Store the weights as float16, bfloat16 or float32",
        )
    return header
