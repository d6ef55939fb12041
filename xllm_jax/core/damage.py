"""Files of our own that somebody else has changed, or a disk: refused in one line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xllm_jax.core import bounded, words
from xllm_jax.core.errors import UserError

# What reading a file of another content than we wrote can raise, in Python, orbax or tensorstore.
ERRORS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    OSError,
    RecursionError,
    TypeError,
    ValueError,
)


@contextlib.contextmanager
def reading(path: str | Path, *other: type[Exception]) -> Iterator[None]:
    """Names the file or folder that a block reads, where its content makes no sense.

    Args:
      path: of the file or folder.
      other: errors that mean something else, and stay.

    Raises:
      UserError: it does not.
    """
    try:
        yield
    except Exception as error:
        bare = type(error) is Exception  # so orbax wraps what tensorstore raises for an array
        if not bare and (isinstance(error, other) or not isinstance(error, ERRORS)):
            raise
        cause = (bare and error.__cause__) or error
        what = " ".join(f"{type(cause).__name__}: {cause}".split())[:200]
        hint = "Bring it back from a copy, or make it again"
        raise UserError(f"is damaged ({what})", field=str(path), hint=hint) from error


@contextlib.contextmanager
def given_to_library(
    folder: str | Path, *names: str, told: str = "cannot be used"
) -> Iterator[None]:
    """Names the folder from which a block lets libraries read, whatever they raise.

    Args:
      folder: of a tokenizer or a model.
      names: of its files that are read as a whole.
      told: of a folder that makes no sense.

    Raises:
      UserError: the library cannot use them, or one is too large, or no regular file.
    """
    for name in names:
        bounded.look(Path(folder) / name)
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        # Libraries written in Rust raise what is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        what = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        hint = "Download its files again"
        raise UserError(f"{told} ({what})", field=str(folder), hint=hint) from error


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
      UserError: the file holds something else.
    """
    with reading(file):
        found = bounded.read_json(file)
        if not isinstance(found, dict):
            raise ValueError(f"no JSON object but {words.kind(found)}")
        return found
