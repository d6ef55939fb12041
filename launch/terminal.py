"""What a command prints reaches any terminal, and what is typed there is read by its encoding."""

from __future__ import annotations

import contextlib
import errno
import io
import locale
import os
import select
import sys
from collections.abc import Iterator
from typing import TextIO

from xllm_jax.core.errors import UserError

UNHEARD = 141  # exit code when who read the output has gone, as a shell says of SIGPIPE

# Characters that steer a terminal or turn the order of what it shows; file names, captions and
# answers may hold them. Tabs, line ends and the carriage return of a progress bar stay.
_STEERING = {*range(32), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)}
_PLAIN = dict.fromkeys(_STEERING - set(map(ord, "\t\n\r")), "\N{REPLACEMENT CHARACTER}")


class Plain:
    """A text stream on which no character steers the terminal; all else is the stream's."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes the text without the characters that steer a terminal."""
        return self._stream.write(text.translate(_PLAIN))

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


@contextlib.contextmanager
def ready() -> Iterator[None]:
    """While it lasts, what is printed is shown as far as the terminal can.

    A character outside of the terminal's encoding becomes a question mark, and bytes that are typed
    in another encoding are kept for `decoded`.

    Raises:
      SystemExit: 141, without a word, when who read the output has gone, as in `| head`.
    """
    before = sys.stdin, sys.stdout, sys.stderr
    for stream, errors in zip(before, ("surrogateescape", "replace", "replace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
    sys.stdout, sys.stderr = (stream and Plain(stream) for stream in before[1:])
    try:
        try:
            yield
        finally:
            for stream in filter(None, before[1:]):
                stream.flush()
    except OSError as error:
        if not unheard(error):
            raise
        _silence(before[1:])
        raise SystemExit(UNHEARD) from None
    finally:
        sys.stdin, sys.stdout, sys.stderr = before


def unheard(error: OSError) -> bool:
    """Whether the pipe behind an output of this process, and no other one, has no reader."""
    if error.errno != errno.EPIPE:
        return False
    poll = select.poll()
    for number in (1, 2):
        poll.register(number, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _silence(streams: tuple[TextIO, ...]) -> None:
    """Leads what is still buffered nowhere; Python would write it at its end, and complain."""
    for stream in filter(None, streams):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def decoded(text: str, field: str) -> str:
    """What was typed, as text: by the locale's encoding, or as UTF-8.

    Args:
      text: a word of the command line or a line of the terminal; bytes that Python could not decode
        are lone surrogates in it.
      field: what it was given as.

    Raises:
      UserError: it is neither.
    """
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        encoding = locale.getencoding()
    with contextlib.suppress(UnicodeError):
        typed = os.fsencode(text)
        for known in (encoding, "utf-8"):
            with contextlib.suppress(UnicodeError):
                return typed.decode(known)
    hint = "Write it in the terminal's encoding, or name its encoding, as LC_ALL=zh_CN.GBK does"
    raise UserError(f"is not written in {encoding}", field=field, hint=hint)
