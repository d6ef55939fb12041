"""What a checkpoint's file says of one tensor before it is read."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Header:
    """Shape and dtype of a tensor that has not been read."""

    shape: tuple[int, ...]
    dtype: np.dtype
