"""Paths whose decoding never ends, or ends its process: what damaged files do to foreign code."""

from __future__ import annotations

import os
import signal
import threading

from xllm_jax.data.media.paths import Carried


class Hanging(Carried):
    """A file at which a decoder waits forever."""

    def __reduce__(self):
        return Hanging, (str(self), b"")

    @property
    def content(self):
        """Never comes."""
        threading.Event().wait()

    @content.setter
    def content(self, value):
        """Kept nowhere."""


class Deadly(Hanging):
    """A file at which a decoder writes where it must not."""

    def __reduce__(self):
        return Deadly, (str(self), b"")

    @property
    def content(self):
        """Ends the process as the kernel would."""
        os.kill(os.getpid(), signal.SIGSEGV)

    @content.setter
    def content(self, value):
        """Kept nowhere."""
