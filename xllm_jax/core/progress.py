"""How far a job is: a bar in a terminal, and a line now and then where the output is kept."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm

SECONDS = 60.0  # least time between two lines
LINE = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


class Bar(tqdm):
    """tqdm; where its output is no terminal, a line at most once a minute and one at the end.

    Args:
      args, options: of `tqdm`.
    """

    def __init__(self, *args: Any, **options: Any):
        self.in_terminal = (options.get("file") or sys.stderr).isatty()
        self._said = time.monotonic()
        if not self.in_terminal:
            options["bar_format"] = LINE
        super().__init__(*args, dynamic_ncols=self.in_terminal, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Draws the bar, or prints the line if a minute has gone by."""
        if self.in_terminal:
            return bool(super().display(msg, pos))
        if msg is None and time.monotonic() - self._said >= SECONDS:
            self._print()
        return False

    def clear(self, nolock: bool = False) -> None:
        """Makes way for other output, which lines need not."""
        if self.in_terminal:
            super().clear(nolock)

    def close(self) -> None:
        """Ends with the last state of the bar, or with a line of it."""
        if not self.in_terminal and not self.disable:
            self._print()
            self.leave = False  # nothing is drawn that had to be kept
        super().close()

    def _print(self) -> None:
        self._said = time.monotonic()
        print(self, file=self.fp, flush=True)
