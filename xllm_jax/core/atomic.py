"""Files and folders that are there whole or not at all, whatever is killed while they are written.

No file system exchanges two folders everywhere, so an old folder is renamed before the new one
takes its name. Between these two moments readers find the old one under its other name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
import uuid
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from xllm_jax.core import disk
from xllm_jax.core.errors import UserError

PARTIAL = ".partial"
REPLACED = ".replaced"
BLOCK = 1 << 20


def partial_name(file: Path) -> Path:
    """Where a file is written before it gets its name: nowhere twice, as process numbers would be
    on two machines that share a folder."""
    return file.with_name(f".{file.name}.{uuid.uuid4().hex}{PARTIAL}")


@contextlib.contextmanager
def whole(file: Path) -> Iterator[Path]:
    """Where to write a file, which gets its name when the block has ended without an error.

    Its folder is made where it is not there; after an error nothing is left.

    Raises:
      CannotWrite: the disk does not let it be written.
    """
    partial = partial_name(file)
    try:
        with disk.writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            partial.replace(file)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def opened(file: Path, mode: str = "a") -> IO[Any]:
    """A file of a folder that a stranger may have filled, opened where it lies.

    Args:
      file: to open; where it is a link, a pipe or a device, it is not.
      mode: as of `open`; text is UTF-8.

    Raises:
      UserError: it is no regular file.
      CannotWrite: as of `disk.writing`.
    """
    odd = UserError("is a link, or no regular file", field=str(file), hint="Remove it")

    def regular(path: str, flags: int) -> int:
        with contextlib.suppress(FileNotFoundError):
            kind = os.lstat(path).st_mode
            if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
                raise odd
        # Whoever puts a link or a pipe there in between wins nothing.
        return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)

    encoding, errors = (None, None) if "b" in mode else ("utf-8", "backslashreplace")
    with disk.writing(file):
        return open(file, mode, encoding=encoding, errors=errors, opener=regular)


def remove_partial(folder: Path, names: Collection[str] = ()) -> None:
    """Removes what killed processes left half written; to be called when all is there.

    Others may write into the same folder at the same time, and what they have begun stays.

    Args:
      folder: with its sub-folders.
      names: of the files whose beginnings go; () is each that was whole after its beginning.
    """
    for left in folder.rglob(f".*{PARTIAL}"):
        whole = left.with_name(left.name[1:].rsplit(".", 2)[0])
        if whole.name in names if names else _is_older(left, whole):
            left.unlink(missing_ok=True)


def _is_older(file: Path, other: Path) -> bool:
    try:
        return file.stat().st_mtime_ns <= other.stat().st_mtime_ns
    except OSError:  # one of them is not there, or no more
        return False


def write_text(file: Path, text: str) -> None:
    """Writes text as UTF-8, whole or not at all."""
    with whole(file) as partial:
        partial.write_text(text, "utf-8", "backslashreplace")


def write_json(file: Path, content: object) -> None:
    """Writes JSON whole or not at all."""
    write_text(file, json.dumps(content, ensure_ascii=False, indent=1) + "\n")


def write_array(file: Path, values: np.ndarray) -> None:
    """Writes an array as `.npy`, whole or not at all."""
    with whole(file) as partial, partial.open("wb") as opened:
        np.save(opened, values)


def sha256(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def replace_folder(directory: Path, partial: Path) -> None:
    """Gives the complete folder `partial` the name `directory`; what was there is removed."""
    old = directory.with_name(directory.name + REPLACED)
    if directory.exists():
        shutil.rmtree(old, ignore_errors=True)
        directory.rename(old)
    partial.rename(directory)
    shutil.rmtree(old, ignore_errors=True)


def whole_folder(directory: str | Path) -> Path:
    """The folder of that name, or the one it was about to replace when the writer was killed."""
    directory = Path(directory).absolute()
    old = directory.with_name(directory.name + REPLACED)
    return old if old.exists() and not directory.exists() else directory
