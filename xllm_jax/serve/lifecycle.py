"""The life of a server: it listens, warms up, answers, and ends when what runs is done.

SIGTERM and Ctrl-C let it finish; the second one ends the process at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from xllm_jax.core.errors import UserError
from xllm_jax.serve.service import Service

ENDS = (signal.SIGTERM, signal.SIGINT)
LONGER = 5.0  # seconds that answers have to be sent behind the engine's end
HEAD_BYTES = 1 << 16  # of a request's head
MESSAGE_BYTES = 1 << 20  # of a WebSocket's message


class Server(uvicorn.Server):
    """Serves one application.

    Args:
      application: ASGI.
      served: its model.
      drain: seconds that requests may take to finish when the server is told to end.

    Attributes:
      ended_by: the first signal that told it to end; 0 for none.
      failed: what the warm-up raised.
    """

    def __init__(self, application: ASGIApp, served: Service, drain: float = 30.0):
        config = uvicorn.Config(
            application,
            log_config=None,
            http="h11",
            ws="websockets-sansio",
            ws_max_size=MESSAGE_BYTES,
            h11_max_incomplete_event_size=HEAD_BYTES,
            proxy_headers=False,
            server_header=False,
            access_log=False,
            timeout_graceful_shutdown=int(drain + LONGER) + 1,
        )
        super().__init__(config)
        self.served, self.drain = served, drain
        self.ended_by = 0
        self.failed: BaseException | None = None
        self._threads: list[threading.Thread] = []

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Warms up beside answering `/health`, and returns when all is done.

        Raises:
          Exception: what the warm-up raised.
        """
        self._start(self._warm_up)
        super().run(sockets)
        for thread in self._threads[1:]:
            thread.join()
        if self.served.easel:
            self.served.easel.close()
        if self.failed:
            raise self.failed

    def _start(self, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _warm_up(self) -> None:
        try:
            self.served.media.warm_up()
            if self.served.ears:
                self.served.ears.warm_up()
            if self.served.easel:
                self.served.easel.warm_up()
            self.served.engine.start()
            print("Ready.", flush=True)
        except BaseException as error:
            self.failed, self.should_exit = error, True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends when all questions are answered, however many pages are still open."""
        closing = asyncio.create_task(self._close_when_answered())
        await super().shutdown(sockets)
        closing.cancel()

    async def _close_when_answered(self) -> None:
        while self.stopping or self.served.metrics.under_way:
            await asyncio.sleep(0.05)
        for connection in list(self.server_state.connections):
            transport = getattr(connection, "transport", None)
            if transport:
                transport.close()

    @property
    def stopping(self) -> bool:
        """Whether the engine still finishes what runs."""
        return any(thread.is_alive() for thread in self._threads[1:])

    @property
    def busy(self) -> bool:
        """Whether a thread still works, as a warm-up that nobody waits for."""
        return any(thread.is_alive() for thread in self._threads)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handles signals while the server runs; none is raised again behind it."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        # A function, not a method: sse-starlette looks for the server behind the handler, and would
        # cut streams off that may finish.
        def take(number: int, frame: FrameType | None) -> None:
            self.handle_exit(number, frame)

        usual = {number: signal.signal(number, take) for number in ENDS}
        try:
            yield
        finally:
            for number, handler in usual.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begins to end, or ends."""
        if self.ended_by:
            with contextlib.suppress(OSError):  # streams may be amid a line of their own
                os.write(2, b"Stopped at once.\n")
            os._exit(128 + sig)
        self.ended_by = sig
        with contextlib.suppress(OSError):
            os.write(2, f"Finishes what runs, for {self.drain:g} s; again: at once\n".encode())
        self.served.draining = self.should_exit = True
        self._start(self._stop)

    def _stop(self) -> None:
        try:
            self.served.engine.stop(self.drain)
        except Exception as error:
            print(f"The engine did not stop: {error}", file=sys.stderr, flush=True)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Args:
      host: name or address.
      port: 0 for any that is free.

    Raises:
      UserError: another program listens there, or there is no such address.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host.strip("[]"), port), family=family, backlog=512)
    except (OSError, OverflowError) as error:
        hint = "Choose another --port, or the --host of an interface of this machine"
        what = f"cannot listen at {host}:{port} ({error})"
        raise UserError(what, field="--port", hint=hint) from None
