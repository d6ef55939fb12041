"""Ctrl-C at a moment at which a block may not be broken off, or nobody would notice.

An import that is broken off leaves modules half made: KeyboardInterrupt became ImportError, or, in
a module of C++ such as jaxlib, ended the process with SIGABRT. Python drops what a callback of the
garbage collector, a weak reference or `__del__` raises, numpy what the array of another library
raises while it is read (`np.asarray`), and the command would go on. So a loop of steps asks.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

Handler = Callable[[int, FrameType | None], object] | int | None
"""What a signal does, as `signal.getsignal` tells it."""

AGAIN = 0.05  # seconds until Ctrl-C is tried once more
STEP_SECONDS = 10.0  # that a step may take to end by itself
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
    _send_later(AGAIN)


def _send_later(seconds: float) -> threading.Timer:
    """Sends Ctrl-C to the main thread, whose waiting it ends, too; may be canceled."""
    main = threading.main_thread().ident or 0
    later = threading.Timer(seconds, signal.pthread_kill, (main, signal.SIGINT))
    later.daemon = True
    later.start()
    return later


class Steps:
    """Ctrl-C in a loop of steps: it ends before the next one, where nothing can drop it.

    A step that takes longer than STEP_SECONDS is broken off, and at the second Ctrl-C any is.
    Before the first one Ctrl-C breaks off what runs; where that was dropped, no step begins.
    Outside of the main thread, and where Ctrl-C does something else already, it changes nothing.
    """

    def __init__(self) -> None:
        self._usual: Handler = None
        self._later: threading.Timer | None = None
        self._asked = self._begun = False

    def install(self) -> None:
        """Takes Ctrl-C from now on."""
        usual = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is threading.main_thread() and _known(usual):
            self._usual = usual
            signal.signal(signal.SIGINT, self.take)

    def restore(self) -> None:
        """Lets Ctrl-C do what it did before."""
        if self._usual is not None:
            signal.signal(signal.SIGINT, self._usual)
            self._usual = None
        if self._later:
            self._later.cancel()

    def begin(self) -> None:
        """From now on, `check` is called before every step."""
        self._begun = True

    def check(self) -> None:
        """Raises KeyboardInterrupt if Ctrl-C came."""
        if self._later:
            self._later.cancel()
        if self._asked:
            raise KeyboardInterrupt

    def take(self, number: int, frame: FrameType | None) -> None:
        """The handler: notes Ctrl-C, or raises KeyboardInterrupt."""
        waits, self._asked = self._begun and not self._asked, True
        if not waits:
            return take(number, frame)
        self._later = _send_later(STEP_SECONDS)
        _say("Ctrl-C: stops after the running step; again: at once")


def _say(line: str) -> None:
    """Says a line on stderr, within a handler: streams may be amid a line of their own."""
    with contextlib.suppress(OSError):  # closed
        os.write(2, f"{line}\n".encode())


def _known(handler: object) -> bool:
    """Whether a handler of Ctrl-C raises KeyboardInterrupt, as Python's own and ours do."""
    ours = isinstance(getattr(handler, "__self__", None), Steps)
    return ours or handler in (signal.default_int_handler, take)


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
    if not main or not _known(usual):
        yield
        return
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if len(came) > 2:
            raise KeyboardInterrupt
        _say("Ctrl-C: stops when the save under way is complete")

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
    if came:
        raise KeyboardInterrupt
