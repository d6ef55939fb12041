"""A folder that is replaced as a whole: at every moment a complete one is there.

No file system exchanges two folders everywhere, so the old one is renamed before the new one takes
its name. Between these two moments readers find the old one under its other name.
"""

from __future__ import annotations

import shutil
from pathlib import Path

REPLACED = ".replaced"


def replace(directory: Path, partial: Path) -> None:
    """Gives the complete folder `partial` the name `directory`; what was there is removed."""
    old = directory.with_name(directory.name + REPLACED)
    if directory.exists():
        shutil.rmtree(old, ignore_errors=True)
        directory.rename(old)
    partial.rename(directory)
    shutil.rmtree(old, ignore_errors=True)


def whole(directory: str | Path) -> Path:
    """The folder of that name, or the one it was about to replace when the writer was killed."""
    directory = Path(directory).absolute()
    old = directory.with_name(directory.name + REPLACED)
    return old if old.exists() and not directory.exists() else directory
