"""Ctrl-C at a moment at which a block may not be broken off, or nobody would notice.

An import that is broken off leaves modules half made: KeyboardInterrupt became ImportError, or, in
a module of C++ such as jaxlib, ended the process with SIGABRT. Python drops what a callback of the
garbage collector, a weak reference or `__del__` raises, and the command would go on.
"""

from __future__ import annotations

import contextlib
import gc
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

AGAIN = 0.05  # seconds until Ctrl-C is tried once more
IMPORT = "<frozen importlib"
DROPPING = ("weakref.py", "_weakrefset.py")  # modules whose callbacks are of weak references


def ready() -> None:
    """Lets Ctrl-C wait for a moment at which it is heeded, unless it does something else."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, take)


def ignore() -> None:
    """Further ones change nothing while a command that was stopped ends."""
    if signal.getsignal(signal.SIGINT) is take:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def take(number: int, frame: FrameType | None) -> None:
    """Raises KeyboardInterrupt, or tries again where it would do harm or be dropped."""
    if not _fragile(frame):
        raise KeyboardInterrupt
    main = threading.main_thread().ident or 0  # a signal also ends its waiting
    later = threading.Timer(AGAIN, signal.pthread_kill, (main, number))
    later.daemon = True
    later.start()


def _fragile(frame: FrameType | None) -> bool:
    """Whether a frame lies within an import or a callback whose exceptions Python drops."""
    collecting = {getattr(callback, "__code__", None) for callback in gc.callbacks}
    while frame:
        code = frame.f_code
        if code.co_filename.startswith(IMPORT) or code.co_filename.endswith(DROPPING):
            return True
        if code in collecting or code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Lets Ctrl-C take effect when the block has ended; the third one breaks it off.

    A save that is broken off leaves threads behind that go on writing. Outside of the main thread,
    and where Ctrl-C does something else already, the block runs as it is.
    """
    main = threading.current_thread() is threading.main_thread()
    usual = signal.getsignal(signal.SIGINT)
    if not main or usual not in (signal.default_int_handler, take):
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
        signal.signal(signal.SIGINT, usual)
    if came:
        raise KeyboardInterrupt
