"""Which files of this machine a data set may name: those of its own folders, links resolved.

A stranger's list can hold any path, `../` and links; a clip or a caption could be a file of
yours. So a source's files lie below `data.root` or the source's own folder, where its options name
others, or where `allow_paths` says so. Everything else costs its record.

Readers open annotations by `data/rows/files.py`, which asks `check_opened`: while a reader of a
source runs, in this thread, its Reach holds. Media are looked at where they are named (`Confined`).
"""

from __future__ import annotations

import contextlib
import contextvars
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import cast

from xllm_jax.core import media_names
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Source
from xllm_jax.data.example import Example
from xllm_jax.data.media import paths

# Options of readers that name a folder or a file, in the user's own words.
OPTIONS = (
    "annotations",
    "answers",
    "audio",
    "captions",
    "features",
    "images",
    "media",
    "questions",
    "videos",
)
MEDIA = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tiff", ".tif", ".wav", ".flac")
MEDIA += (".ogg", ".mp3", ".opus", ".mp4", ".webm", ".mkv", ".avi", ".mov")
LEVELS = 2  # folders below a source whose links are looked at before anything is opened

_holding: contextvars.ContextVar[Reach | None] = contextvars.ContextVar("reach", default=None)


class Reach:
    """Folders and files that a data set may read.

    Args:
      places: they, as the user named them; links in these names are the user's own.

    Attributes:
      places: they, without links.
    """

    def __init__(self, places: Iterable[str]):
        self.places = tuple(dict.fromkeys(os.path.realpath(place) for place in places))

    def check(self, path: str | os.PathLike, what: str = "lies") -> None:
        """Looks where a medium or another file really lies.

        Args:
          path: in any form of `paths.py`; Carried media lie nowhere.
          what: verb of the message.

        Raises:
          UserError: outside, or no file can have that name.
        """
        if isinstance(path, paths.Carried):
            return
        try:
            real = os.path.realpath(paths.place(path).file)
        except ValueError as error:  # a NUL, or half a character
            name = ascii(str(path))[1:-1]
            raise UserError(f"is no name of a file ({error})", field=name) from None
        if not any(real == one or real.startswith(os.path.join(one, "")) for one in self.places):
            whole = f"{what} outside of {', '.join(self.places)}"
            hint = f"Where that is meant, add --allow_paths={os.path.dirname(real)}"
            raise UserError(whole, field=str(path), hint=hint)

    @contextlib.contextmanager
    def holding(self) -> Iterator[None]:
        """While this lasts, this thread opens annotations within reach alone."""
        before = _holding.set(self)
        try:
            yield
        finally:
            _holding.reset(before)

    def check_links(self, folder: str, levels: int = LEVELS) -> None:
        """Looks at links among a source's annotations and folders; those of media come later.

        Args:
          folder: of the source.
          levels: of folders that are looked at.

        Raises:
          UserError: one leads outside.
        """
        try:
            entries = list(os.scandir(folder)) if os.path.isdir(folder) else []
        except OSError as error:
            raise UserError(f"cannot be read ({error.strerror})", field=folder) from None
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_symlink():
                if not entry.name.lower().endswith(MEDIA):
                    self.check(entry.path, "is a link and leads")
            elif levels > 1 and entry.is_dir():
                self.check_links(entry.path, levels - 1)


def check_opened(path: str | os.PathLike) -> None:
    """Looks where a file that a reader opens really lies; outside of readers it may be anywhere.

    Raises:
      UserError: outside of the reach that holds now.
    """
    within = _holding.get()
    if within is not None:
        within.check(path)


def check_all_links(folder: str | os.PathLike) -> None:
    """Looks at the links at any depth of a folder that a library reads by itself.

    Raises:
      UserError: one leads outside of the reach that holds now.
    """
    within = _holding.get()
    if within is not None:
        within.check_links(str(folder), sys.maxsize)


def of(source: Source, root: str, beside: Sequence[str] = ()) -> Reach:
    """What a source may read.

    Args:
      source: as a stage or a command names it.
      root: `data.root`, or ''.
      beside: folders next to the source's own that its layout includes.
    """
    path = os.path.join(root, source.path)
    folder = os.path.dirname(os.path.abspath(path)) if os.path.isfile(path) else path
    named = [source.options[name] for name in OPTIONS if source.options.get(name)]
    near = [os.path.join(os.path.dirname(os.path.abspath(path)), name) for name in beside]
    own = [root] if root else []
    return Reach([*own, folder, *map(str, named), *near, *source.allow_paths])


class Confined(Sequence):
    """The examples of a source; one whose media lie out of reach is a UserError on access."""

    def __init__(self, examples: Iterable[Example], reach: Reach):
        listed = hasattr(examples, "__getitem__") and hasattr(examples, "__len__")
        self._examples = cast(Sequence[Example], examples if listed else list(examples))
        self._reach = reach

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        with self._reach.holding():
            found = self._examples[index]
        files = [path for name, path in found.media if not media_names.is_written(name)]
        for path in (*files, *filter(None, found.pictures)):
            self._reach.check(path)
        return found
