"""A lock on a folder, so that two commands do not write into it at once.

The lock is a file that says which process of which machine holds it. One on the same machine is
asked for at the system. One of another machine cannot be: while it lives it touches the file, and
who waits sees by that whether it does. Only changes count, so that no clock need be right.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any

from xllm_jax.core import disk, hosts
from xllm_jax.core.errors import UserError

BEAT_SECONDS = 10.0  # between two touches
SILENT_SECONDS = 30.0  # without one, after which a holder on another machine counts as gone
LOOK_SECONDS = 0.5
MOST = 1 << 16  # characters of a lock that are read
NAME = "in-use.json"


class Lock:
    """Holds a lock, from `with` to the end of its block.

    Args:
      file: of the lock; its folder is made.
      what: that is locked, for messages.
      hint: what the user may do when another holds it.

    Raises:
      UserError: another process holds it.
      CannotWrite: the file cannot be written.
    """

    def __init__(self, file: Path, what: str, hint: str = "Wait for it, or choose another folder"):
        self._file, self._what, self._hint = file, what, hint
        self._own = {
            "host": socket.gethostname(),
            "process": os.getpid(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
            "machine": machine(),
            "start": start_of(os.getpid()),
            "token": uuid.uuid4().hex,
        }
        self._made = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._touch, name="lock", daemon=True)

    def __enter__(self) -> Lock:
        self._made = not os.path.exists(self._file.parent)  # False for names that cannot be
        disk.make_folder(self._file.parent)
        while not self._create():
            self._take_over()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join(LOOK_SECONDS)
        if read(self._file).get("token") == self._own["token"]:
            with contextlib.suppress(OSError):
                self._file.unlink(missing_ok=True)
                if self._made:
                    self._file.parent.rmdir()  # where nothing came of it, nothing is left

    def _create(self) -> bool:
        with disk.writing(self._file):
            try:
                with self._file.open("x", encoding="utf-8") as opened:
                    json.dump(self._own, opened)
                return True
            except FileExistsError:
                return False
            except OSError:
                self._file.unlink(missing_ok=True)  # an empty lock would tell nobody's name
                raise

    def _take_over(self) -> None:
        """Removes the lock of a process that has ended.

        Raises:
          UserError: it has not.
        """
        held = read(self._file)
        if lives(held) if here(held) else touched(self._file, held):
            raise UserError(f"is in use by {name(held)}", field=self._what, hint=self._hint)
        print(f"{self._what}: taken over from {name(held)}, which has ended", file=sys.stderr)
        if read(self._file).get("token") == held.get("token"):
            with disk.writing(self._file):
                self._file.unlink(missing_ok=True)

    def _touch(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            other = read(self._file)
            if other.get("token", self._own["token"]) != self._own["token"]:
                print(f"{self._what}: taken over by {name(other)}", file=sys.stderr)
                hosts.leave(hosts.LOST)
            with contextlib.suppress(OSError):  # removed by hand, or the disk is gone for a while
                os.utime(self._file)


def read(file: Path) -> dict[str, Any]:
    """What a lock says; {} for none, and for one that is just being written."""
    try:
        found = json.loads(_content(file)[1])
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def name(held: dict[str, Any]) -> str:
    """The holder of a lock, in words."""
    if not held:
        return "a process that has left no name"
    return f"process {held.get('process')} on {held.get('host')} since {held.get('since')}"


def machine() -> str:
    """This start of this machine, or of this container: where process numbers mean the same."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {uuid.getnode()}"


def start_of(process: int) -> str:
    """When a process began, since numbers are given again; '' for one that is gone or unknown."""
    try:
        state, *others = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return ""
    return "" if state == "Z" else others[18]


def here(held: dict[str, Any]) -> bool:
    """Whether the holder runs, or ran, where this process does."""
    return held.get("machine") == machine()


def lives(held: dict[str, Any]) -> bool:
    """Whether a holder on this machine still runs."""
    process = held.get("process")
    if not isinstance(process, int):
        return False
    if start_of(os.getpid()):
        return bool(held.get("start")) and start_of(process) == held["start"]
    try:
        os.kill(process, 0)  # a system without /proc
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def touched(file: Path, held: dict[str, Any]) -> bool:
    """Waits to see whether a holder that cannot be asked touches its lock."""
    seconds = f"{SILENT_SECONDS:.0f} s"
    print(f"{file}: held by {name(held)}; waits {seconds} for a sign of life", file=sys.stderr)
    first, end = _stamp(file), time.monotonic() + SILENT_SECONDS
    while time.monotonic() < end:
        time.sleep(LOOK_SECONDS)
        if _stamp(file) != first:
            return _stamp(file) is not None
    return False


def _stamp(file: Path) -> tuple[int, str] | None:
    """Time and content of the file as the server has it, not as this machine remembers it."""
    try:
        return _content(file)
    except (OSError, ValueError):
        return None


def _content(file: Path) -> tuple[int, str]:
    """Time and content of a lock; of a link, a pipe or anything that is no lock, OSError."""
    number = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(number, encoding="utf-8") as opened:
        return os.fstat(number).st_mtime_ns, opened.read(MOST)
