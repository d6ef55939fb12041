"""The watch over a run: stalls, lost hosts, mistakes of one host, SIGTERM and Ctrl-C.

A thread of every host tells the others through the key-value store that it lives, and looks at
what they tell. Whatever ends one host ends all of them within a bounded time, with an exit code
that says whether the same command would continue the run.
"""

from __future__ import annotations

import contextlib
import faulthandler
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import jax

from xllm_jax.core import atomic, hosts, interrupts
from xllm_jax.core.errors import Diverged, UserError

MISTAKE, DEFECT, STOPPED = 2, 1, 130  # exit codes: a user's mistake, a bug of ours, Ctrl-C
LOST_SECONDS = 60.0  # without a sign of life; below the 100 s after which JAX itself would abort
PERIOD_SECONDS = 2.0  # between two looks
AGREEING_SECONDS = 0.1  # between two looks while the hosts agree on the last step
GRACE_SECONDS = 10.0  # for the others to hear why a host ends
START_FACTOR = 5.0  # loading and compiling may take longer than a step, by this factor
INPUT = "waits for input"
EARLY = "SIGTERM: there is nothing to save"


class Preempted(SystemExit):
    """SIGTERM came and the run was saved; ends the program with `hosts.SAVED`."""

    def __init__(self, step: int):
        super().__init__(hosts.SAVED)
        self.step = step


Beat = Sequence[Any]
"""What a host says at each look: [what it does, micro-batches begun, number of the look]."""


class Watch:
    """Watches over a run, from `with` to the end of its block.

    Args:
      directory: the run's folder; `stall-HOST.txt` is written there.
      stall: seconds without a finished step after which the run ends; 0 waits forever.
      store: of the hosts, None with one.

    Attributes:
      doing: what the host is doing, in words.
      keys: of the samples of the batch that runs.
      reading: gives what is being read just now, in words.
    """

    def __init__(self, directory: Path, stall: float, store: hosts.Store | None):
        self._directory, self._stall, self._store = directory, stall, store
        self.index, self._count = jax.process_index(), jax.process_count()
        self._lost = min(LOST_SECONDS, stall or LOST_SECONDS)
        self._period = min(PERIOD_SECONDS, self._lost / 10)
        self.doing, self.keys = "starts", []
        self.reading: Callable[[], Sequence[str]] = list
        self._moved, self._factor = time.monotonic(), START_FACTOR
        self._beats: dict[str, tuple[Beat, float]] = {}
        self._turn = threading.Condition()  # guards what the agreement on the last step reads
        self._begun: int | None = None  # micro-batches; None until the steps begin
        self._asked, self._last = False, None
        self._count_of_looks, self._terms = 0, 0
        self._ours, self._theirs = socket.socketpair()
        self._thread = threading.Thread(target=self._attend, name="watch", daemon=True)
        self._before: tuple[interrupts.Handler, int] | None = None
        self._interrupts = interrupts.Steps()

    def __enter__(self) -> Watch:
        self._ours.setblocking(False)
        if threading.current_thread() is threading.main_thread():
            # A handler in Python would wait for the main thread to return from C; bytes do not.
            handler = signal.signal(signal.SIGTERM, lambda *_: None)
            self._before = handler, signal.set_wakeup_fd(self._ours.fileno())
        self._interrupts.install()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._interrupts.restore()
        if error is not None and self._store and not isinstance(error, SystemExit):
            self._fail(error)
        if self._before:
            signal.set_wakeup_fd(self._before[1])
            signal.signal(signal.SIGTERM, self._before[0])
        self.doing = "done"
        with contextlib.suppress(OSError):  # a signal has woken the thread, and it is gone
            self._ours.send(b"\0")
        self._thread.join(GRACE_SECONDS)
        if error is None:
            self._interrupts.check()  # Ctrl-C after the last step

    def start(self, number: int) -> None:
        """Notes that the steps begin after `number` micro-batches.

        Until then SIGTERM ends all hosts at once with `hosts.SAVED`.
        """
        with self._turn:
            if not self._asked:  # the number that this host has sent to the others stays valid
                self._begun = number
        self._interrupts.begin()

    def moved(self, doing: str, keys: Sequence[str] | None = None) -> None:
        """Notes that the host has begun something else, and with which samples.

        Raises:
          KeyboardInterrupt: Ctrl-C came before.
        """
        self._interrupts.check()
        self.doing, self._moved = doing, time.monotonic()
        self.keys = self.keys if keys is None else list(keys)

    def stepped(self) -> None:
        """Notes that a step was finished; what comes after is no start any more."""
        self._factor = 1.0

    def compiles(self) -> None:
        """Notes that something new is compiled, which may take as long as a start, until `stepped`
        is called again."""
        self._factor = START_FACTOR

    @property
    def stopping(self) -> bool:
        """Whether SIGTERM has come."""
        return self._asked

    def reached(self, number: int) -> bool:
        """Whether to stop after `number` micro-batches; asked before each, by every host.

        After SIGTERM to any host, all stop at the same number: the largest that one of them has
        begun. While they agree, nobody begins another. Where one had not come to its first, none
        can have finished another, and all of them end.

        Raises:
          KeyboardInterrupt: Ctrl-C came before.
        """
        self._interrupts.check()
        with self._turn:
            while self._asked and self._last is None:
                self._turn.wait(1.0)
            if self._last is not None and number >= self._last:
                return True
            self._begun = number + 1
            return False

    def _attend(self) -> None:
        """The thread: looks now and then, and at once after a signal."""
        while self.doing != "done":
            wait = AGREEING_SECONDS if self._asked and self._last is None else self._period
            ready, _, _ = select.select([self._theirs], [], [], wait)
            signals = self._theirs.recv(64) if ready else b""
            for number in signals:
                if number == signal.SIGTERM:
                    self._terminated()
            try:
                self._look()
            except jax.errors.JaxRuntimeError as error:  # the store is gone, and host 0 with it
                self._end(hosts.LOST, f"host 0 was lost ({' '.join(str(error).split())[:120]})")
        if self._store:
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # host 0 may have gone before
                self._store.put(f"beat/{self.index}", ["done", 0, 0])
        self._theirs.close()
        self._ours.close()

    def _terminated(self) -> None:
        self._terms += 1
        if self._terms > 1:
            # Schedulers repeat it while a save is under way, which it must not break.
            print("SIGTERM again: it saves already", file=sys.stderr, flush=True)
            return
        if self._begun is not None:
            print("SIGTERM: saves after the running micro-batch", file=sys.stderr, flush=True)
        if self._store:
            self._store.put(f"stop-wanted/{self.index}", True)
        else:
            self._hold()

    def _look(self) -> None:
        still = time.monotonic() - self._moved
        stalled = self._stall and still > self._stall * self._factor
        if self._store is None:
            if stalled:
                self._dump(f"host 0 {self.doing} for {still:.0f} s")
                self._end(hosts.LOST, f"no step was finished for {still:.0f} s{self._see()}")
            return
        self._count_of_looks += 1
        self._store.put(f"beat/{self.index}", [self.doing, self._begun or 0, self._count_of_looks])
        beats = self._store.all("beat")
        self._check_faults(self._store)
        if stalled:
            self._blame(f"{slowest(beats)}; no step was finished for {still:.0f} s", stall=True)
        self._check_silence(beats)
        if self._store.all("stop-wanted") or self._asked:
            self._hold()

    def _hold(self) -> None:
        """Holds every next step back until all hosts have sent the number of theirs."""
        with self._turn:
            if self._last is not None:
                return
            if not self._asked:
                self._asked = True
                if self._store:
                    self._store.put(f"begun/{self.index}", self._begun)
            answers = self._store.all("begun") if self._store else {"0": self._begun}
            begun = [number for number in answers.values() if number is not None]
            if len(begun) == self._count:
                self._last = max(begun)
                self._turn.notify_all()
        if len(begun) < len(answers):
            self._leave_early()

    def _leave_early(self) -> None:
        """Ends all hosts by the word of host 0, which holds the store."""
        if self._store is None:
            self._end(hosts.SAVED, EARLY)
        if self.index == 0:
            self._blame(EARLY, hosts.SAVED)

    def _check_silence(self, beats: dict[str, Beat]) -> None:
        now = time.monotonic()
        for host, beat in beats.items():
            if host not in self._beats or self._beats[host][0] != beat:
                self._beats[host] = beat, now
            elif beat[0] != "done" and now - self._beats[host][1] > self._lost:
                self._blame(f"host {host} gave no sign of life for {self._lost:.0f} s")

    def _check_faults(self, store: hosts.Store) -> None:
        for host, fault in sorted(store.all("fault").items()):
            if host != str(self.index):
                if fault["stall"]:
                    self._dump(fault["why"])
                store.put(f"heard/{self.index}", True)
                if self.index == 0:
                    self._await_heard(store, host)
                why = fault["why"] + (self._see() if fault["stall"] else "")
                named = why.startswith("host ")
                self._end(fault["code"], why if named else f"host {host}: {why}")

    def _await_heard(self, store: hosts.Store, *besides: str) -> None:
        """Host 0 holds the store, so it leaves last."""
        end = time.monotonic() + GRACE_SECONDS
        expected = {str(host) for host in range(self._count)} - {str(self.index), *besides}
        expected -= {host for host, beat in self._beats.items() if self._silent(beat)}
        while expected - store.all("heard").keys() and time.monotonic() < end:
            time.sleep(0.1)

    def _silent(self, beat: tuple[Beat, float]) -> bool:
        return beat[0][0] == "done" or time.monotonic() - beat[1] > self._lost

    def _blame(self, why: str, code: int = hosts.LOST, stall: bool = False) -> None:
        """Sends the others the reason why the run ends, and ends it."""
        if stall:
            self._dump(why)
        if self._store:
            self._store.put(f"fault/{self.index}", {"why": why, "code": code, "stall": stall})
            if self.index == 0:
                self._await_heard(self._store)
        self._end(code, why + (self._see() if stall else ""))

    def _fail(self, error: BaseException) -> None:
        """An exception of this host ends all of them, unless it only tells of another's end."""
        if isinstance(error, Diverged):
            return  # every host meets it at the same look, and keeps its own rows
        if isinstance(error, UserError):
            self._blame(str(error), getattr(error, "code", MISTAKE))
        if isinstance(error, KeyboardInterrupt):
            self._blame(f"host {self.index} was stopped", STOPPED)
        traceback.print_exception(error)
        sys.stderr.flush()
        # A broken connection of a collective tells nothing; the store will, if a host was lost.
        self._stall = 0.0  # this wait is no stall
        self._thread.join(self._lost + 5 * self._period)
        self._blame(f"host {self.index} failed ({type(error).__name__}: {error})"[:300], DEFECT)

    def _see(self) -> str:
        return f"; see {self._directory / f'stall-{self.index}.txt'}"

    def _dump(self, why: str) -> None:
        """Writes what every thread of this host is at, and which samples are under way."""
        # A full disk must not keep a stalled run alive.
        with contextlib.suppress(OSError, UserError):
            self._write_stacks(why)

    def _write_stacks(self, why: str) -> None:
        name = self._directory / f"stall-{self.index}.txt"
        with atomic.whole(name) as partial, partial.open("w", encoding="utf-8") as file:
            file.write(f"{why}\n")
            file.write(f"this is host {self.index} of {self._count}, which {self.doing}\n")
            file.write(f"being read: {', '.join(self.reading()) or 'nothing'}\n")
            file.write(f"samples of the batch that runs: {', '.join(map(str, self.keys))}\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)

    def _end(self, code: int, why: str) -> None:
        again = ". Run the same command again" if code in (hosts.LOST, hosts.SAVED) else ""
        print(" ".join(f"{why}{again}".split()), file=sys.stderr)
        hosts.leave(code)


def slowest(beats: dict[str, Beat]) -> str:
    """Which host keeps the others waiting, in words.

    Args:
      beats: {host: (what it does, micro-batches it has begun, …)}.
    """
    least = min(beat[1] for beat in beats.values())
    late = {host: beat for host, beat in beats.items() if beat[1] == least}
    hungry = {host: beat for host, beat in late.items() if beat[0] == INPUT}
    named = sorted((hungry or late).items(), key=lambda row: int(row[0]))
    return ", ".join(f"host {host} {beat[0]}, micro-batch {beat[1]}" for host, beat in named[:5])
