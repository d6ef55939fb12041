"""Decoding in worker processes, so that a file on which a decoder hangs or dies costs one record.

A decoder is somebody else's C code: it can loop forever or end its process on damaged input, and
a thread can be neither stopped nor replaced. So each decoding thread has a worker process; a worker
that does not answer by the deadline is killed, and the next file starts a new one. The kernel also
bounds the memory that one file may take, and a worker that has kept too much of it is replaced.

    python -m xllm_jax.data.media.decode_workers DESCRIPTOR BYTES    a worker, reached by a socket
"""

from __future__ import annotations

import os
import queue
import resource
import signal
import subprocess
import sys
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import numpy as np

from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Data, Source
from xllm_jax.core.text_lines import split_lines
from xllm_jax.data.media import facts, image, modalities, speech, video
from xllm_jax.data.media.facts import Facts
from xllm_jax.data.record import DoesNotFit, Record

START_SECONDS = 120.0  # a worker may take to start on a busy machine
GRACE_SECONDS = 30.0  # after the deadline a worker ends by itself, should its owner be gone
TASKS = {"load": modalities.load, "check": modalities.check}
TASKS |= {"samples": speech.read, "square": image.square, "facts": facts.of, "seen": video.seen}
MODULE = "xllm_jax.data.media.decode_workers"
ROOT = str(Path(__file__).parents[3])  # where the package lies, for the worker to import it


class Lost(Exception):
    """A worker did not answer."""


class Worker:
    """One process that decodes one file at a time.

    Args:
      memory: bytes that it may take for a file.

    Attributes:
      resident: bytes that it held when it last answered.
    """

    def __init__(self, memory: int) -> None:
        self.resident = 0
        self._connection, theirs = Pipe()
        paths = [ROOT, *filter(None, sys.path)]  # further modalities are found as they are here
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", MODULE, str(theirs.fileno()), str(memory)],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            )
        self._ready = False

    def ask(self, task: str, arguments: tuple[object, ...], deadline: float) -> Any:
        """What `answer` returns.

        Raises:
          Lost: no answer within `deadline` seconds, or the worker has died.
        """
        if not self._ready:
            self._receive(START_SECONDS, "did not start")
            self._ready = True
        try:
            self._connection.send((deadline, task, arguments))
        except OSError as error:
            raise Lost("ended its decoder") from error
        made, self.resident = self._receive(deadline, f"took longer than {deadline:g} s to decode")
        return made

    def _receive(self, seconds: float, late: str) -> Any:
        try:
            if not self._connection.poll(seconds):
                raise Lost(late)
            return self._connection.recv()
        except (EOFError, OSError) as error:
            code = self._process.wait()
            told = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            raise Lost(f"ended its decoder ({told})") from error

    def end(self) -> None:
        """Kills the process, whatever it does."""
        self._process.kill()
        self._process.wait()
        self._connection.close()


class Decoders:
    """As many workers as threads ask at once, started when they are needed.

    Args:
      data: of the stage; `threads` workers at most, `deadline` seconds and `memory` GB a file.
    """

    def __init__(self, data: Data):
        self._deadline, self._memory = data.deadline, int(data.memory * 1e9)
        self._idle: queue.SimpleQueue[Worker | None] = queue.SimpleQueue()
        self._count = max(data.threads, 1)
        for _ in range(self._count):
            self._idle.put(None)

    def load(
        self, modality: str, path: str, data: Data, record: Record, part: int, train: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """`media.load` with a deadline.

        Raises:
          UserError: as there, and for a file whose decoder was late or died.
        """
        return self._ask("load", (modality, path, data, record, part, train), path)

    def check(self, modality: str, path: str, source: Source) -> None:
        """`media.check` with a deadline.

        Raises:
          UserError: as there, and for a file whose decoder was late or died.
        """
        self._ask("check", (modality, path, source), path)

    def samples(self, path: str) -> np.ndarray:
        """`speech.read` with a deadline: `[samples]` float32 at 16 kHz on the 16-bit scale.

        Raises:
          UserError: as there, and for a file whose decoder was late or died.
        """
        return self._ask("samples", (path,), path)

    def square(self, path: str, side: int) -> np.ndarray:
        """`image.square` with a deadline: `[side, side, 3]` float32.

        Raises:
          UserError: as there, and for a file whose decoder was late or died.
        """
        return self._ask("square", (path, side), path)

    def seen(self, path: str, data: Data) -> list[np.ndarray]:
        """`video.seen` with a deadline: `[size, size, 3]` uint8 each.

        Raises:
          UserError: as there, and for a file whose decoder was late or died.
        """
        return self._ask("seen", (path, data), path)

    def facts(self, modality: str, path: str) -> Facts:
        """`facts.of` with a deadline.

        Raises:
          UserError: as there, and for a file whose decoder was late or died.
        """
        return self._ask("facts", (modality, path), path)

    def _ask(self, task: str, arguments: tuple[object, ...], path: str) -> Any:
        worker = self._idle.get()
        try:
            worker = worker or Worker(self._memory)
            answer = worker.ask(task, arguments, self._deadline)
            if worker.resident > self._memory:  # it may not give back what a large file took
                worker.end()
                worker = None
        except BaseException as error:
            if worker:
                worker.end()
            worker = None
            if not isinstance(error, Lost):
                raise
            hint = "Leave it out, or raise the deadline"
            raise UserError(str(error), field=str(path), hint=hint) from None
        finally:
            self._idle.put(worker)
        return _told(answer)

    def close(self) -> None:
        """Ends all workers; none may be at work. The next file starts new ones."""
        for _ in range(self._count):
            worker = self._idle.get()
            if worker:
                worker.end()
            self._idle.put(None)


def _told(answer: tuple) -> Any:
    """The value of an answer.

    Raises:
      UserError: the one that the worker met.
    """
    kind, *rest = answer
    if kind == "made":
        return rest[0]
    what, field, line = rest
    error = (DoesNotFit if kind == "does not fit" else UserError)(what, field=field)
    error.args = (line,)
    raise error


def answer(task: str, arguments: tuple[object, ...]) -> tuple[object, ...]:
    """What a worker sends back: ('made', value) or (kind of error, what, field, line).

    Args:
      task: one of TASKS.
      arguments: of it.
    """
    try:
        return "made", TASKS[task](*arguments)
    except UserError as error:
        kind = "does not fit" if isinstance(error, DoesNotFit) else "cannot be read"
        return kind, error.what, error.field, str(error)


def bound_memory(more: int) -> None:
    """Lets this process take `more` bytes beyond what it has; asking for more is a MemoryError.

    Code that cannot bear that ends the process, which costs the file all the same.
    """
    taken = _status("VmData")
    resource.setrlimit(resource.RLIMIT_DATA, (taken + more, resource.RLIM_INFINITY))


def _status(field: str) -> int:
    """Bytes that Linux counts for this process; 0 on systems that do not tell."""
    try:
        lines = split_lines(Path("/proc/self/status").read_text())
    except OSError:
        return 0
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith(f"{field}:")), 0)


def serve(connection: Connection, memory: int) -> None:
    """A worker's life: files in, arrays and its own size out, until the other end closes."""
    for ends in (signal.SIGINT, signal.SIGTERM):  # the owner's to handle; both reach whole groups
        signal.signal(ends, signal.SIG_IGN)
    bound_memory(memory)
    connection.send("ready")
    while True:
        try:
            deadline, task, arguments = connection.recv()
        except EOFError:
            return
        # The kernel's clock ends a hanging worker even where Python does not come to run.
        signal.setitimer(signal.ITIMER_REAL, deadline + GRACE_SECONDS)
        made = answer(task, arguments)
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.send((made, _status("VmRSS")))


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])), int(sys.argv[2]))
