"""Ctrl-C at a moment at which a block may not be broken off."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Lets Ctrl-C take effect when the block has ended; the third one breaks it off.

    A save that is broken off leaves threads behind that go on writing. Outside of the main thread,
    and where Ctrl-C does something else already, the block runs as it is.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    came: list[int] = []

    def note(number: int, frame: Any) -> None:
        came.append(number)
        if len(came) > 2:
            raise KeyboardInterrupt
        print("Ctrl-C: stops when the save under way is complete", file=sys.stderr, flush=True)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if came:
        raise KeyboardInterrupt
