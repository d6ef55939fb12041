"""A disk that cannot be written to: what to say about it, and what to leave unsaid.

Python names the cause by a number; C++ below orbax and ArrayRecord puts the same words into other
exceptions.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from xllm_jax.core.errors import CannotWrite, UserError

# No file can be written there any more, whoever asks.
CLOSED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
TOLD = re.compile(r"(\S+): cannot be written \(")
WORDS = tuple(map(os.strerror, CLOSED))
# This place cannot be written to; elsewhere in a command they may tell of a file that it reads.
DENIED = (errno.EACCES, errno.EPERM)
MISPLACED = (
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.ELOOP,
)


def failure(error: BaseException) -> tuple[str, str] | None:
    """(file or '', reason) where an error, or one that it follows from, tells of a closed disk."""
    for one in _chain(error):
        if isinstance(one, CannotWrite):
            return one.field, one.reason
        if isinstance(one, OSError) and one.errno in CLOSED:
            return str(one.filename2 or one.filename or ""), os.strerror(one.errno)
        if isinstance(one, ValueError | RuntimeError):
            for words in WORDS:
                if words in str(one):  # Beam brings what its workers raised as text
                    told = TOLD.search(str(one))
                    return (told[1] if told else ""), words
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    todo, seen = [error], set()
    while todo:
        one = todo.pop(0)
        if id(one) not in seen:
            seen.add(id(one))
            yield one
            todo += getattr(one, "exceptions", ())
            todo += [other for other in (one.__cause__, one.__context__) if other]


@contextlib.contextmanager
def writing(path: str | Path, also: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Names the file that a block writes where the disk does not let it.

    Args:
      path: file or folder that is written.
      also: errors of a library that tell of the disk whatever they say: what comes after the first
        failure may be another one's consequence.

    Raises:
      CannotWrite: the disk is full or read-only, or the permission is missing.
      UserError: a part of the path is no folder, or a folder is where a file should be.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = _reason(error, Path(path))
        if reason is None and isinstance(error, also):
            reason = " ".join(str(error).split())[:200]
        if reason is None:
            raise
        if isinstance(error, OSError) and error.errno in MISPLACED:
            hint = "Choose another place"
            raise UserError(f"cannot be written ({reason})", field=str(path), hint=hint) from error
        raise CannotWrite(str(path), reason) from error


def _reason(error: Exception, path: Path) -> str | None:
    found = failure(error)
    if found:
        return found[1]
    if isinstance(error, OSError) and error.errno in (*DENIED, *MISPLACED):
        named = Path(error.filename) if isinstance(error.filename, str) else path
        if named in (path, *path.parents) or named.parent == path.parent:
            return os.strerror(error.errno)
    return None


def make_folder(path: Path) -> None:
    """Makes a folder with its parents, where it is not there.

    Raises:
      CannotWrite, UserError: as of `writing`, and for a name that nobody can mean.
    """
    odd = [part for part in path.parts if not part.strip() or not part.isprintable()]
    if odd:
        what = f"has {odd[0]!r} in its name"
        raise UserError(what, field=ascii(str(path))[1:-1], hint="Choose another place")
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def told(safe: Callable[[], str]) -> Iterator[None]:
    """Adds to a `CannotWrite` of the block what is safe, and makes one of a closed disk's errors.

    Args:
      safe: says in a sentence what is intact.
    """
    try:
        yield
    except Exception as error:
        found = failure(error)
        if found is None or (isinstance(error, CannotWrite) and error.safe):
            raise
        if isinstance(error, UserError) and not isinstance(error, CannotWrite):
            raise
        raise CannotWrite(*found, safe()) from error


class Raised(logging.Filter):
    """Drops records about errors that are raised as well.

    Orbax logs each with its traceback before it raises it, and asyncio, which nobody else uses,
    repeats it for every array that was read or written at the same time.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is shown."""
        if record.name == "asyncio" and "exception was never retrieved" in record.getMessage():
            return False
        error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
        return error is None or not ("orbax" in Path(record.pathname).parts or failure(error))


def say_once() -> None:
    """Lets a closed disk be told by the error that is raised alone; for a whole process."""
    warnings.filterwarnings("ignore", "Error writing persistent compilation cache")
    # Of arrays that orbax had yet to read when another one's error ended it.
    warnings.filterwarnings(
        "ignore", r"coroutine '_(read|write)_array\w*' was never", RuntimeWarning
    )
    for name in ("asyncio", "absl"):
        logging.getLogger(name).addFilter(Raised())
    hook = sys.unraisablehook

    def shown(args: sys.UnraisableHookArgs) -> None:
        if not _given_up(args):
            hook(args)

    sys.unraisablehook = shown


def _given_up(args: sys.UnraisableHookArgs) -> bool:
    """Whether orbax and tensorstore still talk of what they have given up, and raised before."""
    code = getattr(args.object, "cr_code", None)
    of_orbax = code is not None and "orbax" in Path(code.co_filename).parts
    return of_orbax or str(args.exc_value) == "Event loop is closed"
