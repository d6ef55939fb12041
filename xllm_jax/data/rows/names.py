"""The files of a folder, found by a key of their names, in NumPy arrays."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence

import numpy as np

from xllm_jax.core import litter

LONGEST = 256  # letters of a name that are looked at; no file system has longer ones


class Names:
    """The files of a folder and its sub-folders, found by a key of their names, in NumPy arrays.

    Args:
      folder: where to look.
      key: from a file's name to its key, a number or a text; None leaves the file out.
    """

    def __init__(self, folder: str | os.PathLike, key: Callable[[str], int | str | None]):
        self._folder, keys, paths = str(folder), [], []
        for place, names in litter.walk(folder, lambda name: key(name) is not None):
            below = os.path.relpath(place, folder)
            found = [(key(name), name) for name in names]
            found = [(one, os.path.normpath(os.path.join(below, name))) for one, name in found
                     if one is not None]  # fmt: skip
            if found:
                keys.append(_compact([one for one, _ in found]))
                paths.append(_compact([path for _, path in found]))
        self._keys = np.concatenate(keys) if keys else np.zeros(0, np.int64)
        order = np.argsort(self._keys, kind="stable")
        self._keys = self._keys[order]
        self._paths = (np.concatenate(paths) if paths else np.zeros(0, "S1"))[order]

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, keys: Sequence[int | str]) -> np.ndarray:
        """Place of each key among the files, -1 where there is none."""
        wanted = _compact([_known(key) for key in keys] if not isinstance(keys, range) else keys)
        if not len(self._keys) or wanted.dtype.kind != self._keys.dtype.kind:
            return np.full(len(wanted), -1)
        at = np.minimum(np.searchsorted(self._keys, wanted), len(self._keys) - 1)
        return np.where(self._keys[at] == wanted, at, -1)

    def path(self, at: int) -> str:
        """The file at a place that `find` gave."""
        return os.path.join(self._folder, os.fsdecode(bytes(self._paths[at])))


def number(name: str) -> int | None:
    """The number that a file's name starts with, as downloaders call the n-th picture of a list."""
    found = re.match(r"\d{1,18}(?=[._]|$)", name)
    return int(found.group()) if found else None


def _known(key: int | str) -> int | str:
    """The key, or in the place of one that no file can have another such, which takes few bytes."""
    if isinstance(key, str):
        return key[:LONGEST]
    return int(key) if abs(key) < 2**63 else -1


def _compact(values: Sequence[int | str]) -> np.ndarray:
    if isinstance(values, range) or all(isinstance(one, int) for one in values):
        return np.asarray(values, np.int64)
    return np.asarray([_encoded(str(value)) for value in values])


def _encoded(name: str) -> bytes:
    try:
        return os.fsencode(name)
    except UnicodeEncodeError:  # escapes of JSON that are no characters
        return name.encode("utf-8", "backslashreplace")
