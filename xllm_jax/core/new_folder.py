"""A folder that is written beside its place, and by one command at a time."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from xllm_jax.core import atomic, disk, lock

LOOKS, PAUSE = 5, 0.1  # how often a folder is removed again after an error; seconds


def partial_folder(directory: Path) -> Path:
    """Where a folder is written before it gets its name; the same on all hosts."""
    return directory.with_name(directory.name + atomic.PARTIAL)


@contextlib.contextmanager
def new_folder(directory: Path) -> Iterator[Path]:
    """Where to write a folder, which gets its name when the block has ended without an error.

    What was there before is replaced then; after an error nothing is left of the new one.

    Raises:
      UserError: another command writes it.
      CannotWrite: the disk does not let it be written.
    """
    partial = partial_folder(directory)
    with lock.Lock(directory.with_name(f".{directory.name}.{lock.NAME}"), str(directory)):
        if partial.is_symlink():  # which `rmtree` leaves, and writing would follow
            partial.unlink()
        shutil.rmtree(partial, ignore_errors=True)
        try:
            with disk.writing(directory):
                yield partial
                atomic.replace_folder(directory, partial)
        except BaseException:
            _remove(partial)
            raise


def _remove(folder: Path) -> None:
    """Removes a folder into which threads of a save that failed may still write.

    TensorStore's threads cannot be waited for: they end within a moment, but what they write behind
    the removal would stay.
    """
    for _ in range(LOOKS):
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(PAUSE)
    shutil.rmtree(folder, ignore_errors=True)
