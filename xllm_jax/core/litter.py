"""What systems and broken downloads leave among the files that somebody means: left out, counted.

macOS writes `._NAME` beside every NAME on disks of others and into archives, Windows `Thumbs.db`,
Jupyter copies of files; a download that failed leaves a file without a byte.
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

FILE = re.compile(
    r"\._.*|\.DS_Store|\.localized|Icon\r|Thumbs\.db(:encryptable)?|ehthumbs(_vista)?\.db"
    r"|desktop\.ini|\.directory|\.nfs[0-9a-f]+",
    re.IGNORECASE | re.DOTALL,
)
FOLDER = re.compile(
    r"__MACOSX|\.(AppleDouble|DocumentRevisions-V100|Spotlight-V100|TemporaryItems|Trashes"
    r"|fseventsd|ipynb_checkpoints|Trash-\d+)|\$RECYCLE\.BIN|System Volume Information|@eaDir",
    re.IGNORECASE,
)
SYSTEM, EMPTY = "system files", "empty files"


class LeftOut:
    """Counts what is left out of one place, and says it once.

    Args:
      place: folder or archive, for the message.
    """

    def __init__(self, place: str | os.PathLike):
        self._place, self._counts = place, Counter[str]()

    def takes(self, name: str, size: int | None = None) -> bool:
        """Whether a file is litter; then it counts.

        Args:
          name: of the file, with the folders below the place.
          size: in bytes; None where it does not matter.
        """
        kind = SYSTEM if named_so(name) else EMPTY if size == 0 else ""
        self._counts.update([kind] if kind else [])
        return bool(kind)

    def report(self) -> None:
        """Says how many files were left out, if any."""
        if self._counts:
            told = " and ".join(f"{count} {kind}" for kind, count in sorted(self._counts.items()))
            logging.getLogger(__name__).warning("%s: left out %s", self._place, told)


def named_so(name: str) -> bool:
    """Whether a file's name, or one of the folders before it, is that of litter."""
    *folders, last = PurePosixPath(name).parts or ("",)
    return bool(FILE.fullmatch(last)) or any(map(FOLDER.fullmatch, folders))


def walk(
    folder: str | os.PathLike, wanted: Callable[[str], bool]
) -> Iterator[tuple[str, list[str]]]:
    """(folder, names of its files that are wanted and no litter), sub-folders included, sorted.

    Args:
      folder: where to look.
      wanted: whether a name is one of those that are looked for.
    """
    left = LeftOut(folder)
    for place, inner, names in os.walk(folder):
        inner[:] = sorted(name for name in inner if not FOLDER.fullmatch(name))
        asked = filter(wanted, sorted(names))
        yield place, [one for one in asked if not left.takes(one, _size(os.path.join(place, one)))]
    left.report()


def glob(folder: str | os.PathLike, pattern: str) -> list[Path]:
    """The files and folders of a pattern without litter, sorted."""
    folder = Path(folder)
    left = LeftOut(folder / pattern)
    found = [
        path
        for path in sorted(folder.glob(pattern))
        if not left.takes(path.relative_to(folder).as_posix(), _size(path))
    ]
    left.report()
    return found


def filled(folder: str | os.PathLike) -> bool:
    """Whether a folder holds anything that somebody put there."""
    return any(not named_so(name) for name in os.listdir(folder))


def _size(path: str | os.PathLike) -> int | None:
    """Bytes of a file; None of anything else, and of one that is gone."""
    try:
        return os.path.getsize(path) if not os.path.isdir(path) else None
    except OSError:
        return None
