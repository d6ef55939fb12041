"""What every request passes: its name, its bounds, its key, one line in the log.

Pure ASGI, so that streams pass as they come and a client that leaves is noticed.
"""

from __future__ import annotations

import asyncio
import dataclasses
import sys
import time
import traceback
import uuid
from collections.abc import Collection
from typing import Any, TextIO

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from xllm_jax.serve import errors
from xllm_jax.serve.errors import ApiError
from xllm_jax.serve.limits import Limits
from xllm_jax.serve.metrics import Metrics
from xllm_jax.serve.security import Keys, Names

MODEL, PAGE = "/v1/", "/page"
OPEN = ("/health", "/ready")  # without a key
POLICY = {"x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}
UNKNOWN = "unknown"  # route of a path that nobody serves; the path itself is a stranger's text


@dataclasses.dataclass
class Asked:
    """What is known of a request while it is answered; `scope['state']['asked']`.

    Attributes:
      id: its name in logs and headers, 32 hexadecimal digits.
      held: bytes of its body.
      notes: further words of its line in the log, names and numbers.
    """

    id: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)
    held: int = 0
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)


class Gate:
    """ASGI middleware.

    Args:
      app: what is behind the gate.
      keys, names: who may ask.
      limits: of requests.
      metrics: that count them.
      routes: paths that are served.
      guarded: prefixes of paths that need a key.
      log: where lines go; None for nowhere.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Keys,
        names: Names,
        limits: Limits,
        metrics: Metrics,
        routes: Collection[str] = (),
        guarded: tuple[str, ...] = ("/v1", "/metrics"),
        log: TextIO | None = None,
    ):
        self.app, self.keys, self.names, self.limits = app, keys, names, limits
        self.metrics, self.guarded, self.log = metrics, guarded, log
        self.routes = frozenset(routes)
        self.requests = self.bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        asked, began, path = Asked(), time.monotonic(), scope["path"]
        scope.setdefault("state", {})["asked"] = asked
        self.requests += 1
        asks = path.startswith(MODEL)
        self.metrics.under_way += asks
        status: list[int] = []
        try:
            await self._pass(scope, receive, self._named(send, asked, status), asked, status)
        finally:
            self.requests -= 1
            self.metrics.under_way -= asks
            self.bytes -= asked.held
            seconds = time.monotonic() - began
            self._tell(scope, path, asked, status[0] if status else 499, seconds)

    async def _pass(
        self, scope: Scope, receive: Receive, send: Send, asked: Asked, status: list[int]
    ) -> None:
        headers = Headers(scope=scope)
        try:
            self._check(scope, headers)
            return await self.app(scope, self._bounded(receive, asked), send)
        except ApiError as error:
            found = error
        except Exception as error:
            if _is_disconnect(error):
                return
            found = errors.unexpected(asked.id)
            self._trace(asked)
        if status:  # it is too late to say it
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": found.message[:100]})
            return
        headers = found.headers() | {"connection": "close"}
        response = JSONResponse(found.body(), found.status, headers)
        await response(scope, receive, send)

    def _check(self, scope: Scope, headers: Headers) -> None:
        if self.requests > self.limits.requests:
            raise ApiError(503, "Too many requests are under way", "server_error", "overloaded")
        self.names.check(headers)
        if "transfer-encoding" in headers and "content-length" in headers:
            # A proxy on the way may have believed the other one, and see two requests in one.
            raise ApiError(400, "The request states its length twice", code="wrong_length")
        if scope["path"].startswith(self.guarded):
            self.keys.check(headers)
        stated = headers.get("content-length", "0")
        if stated.isascii() and stated.isdigit() and int(stated[:20]) > self.limits.body:
            raise self._too_large()

    def _too_large(self) -> ApiError:
        most = self.limits.body
        return ApiError(413, f"The request has more than {most:,} bytes", code="request_too_large")

    def _bounded(self, receive: Receive, asked: Asked) -> Receive:
        until, whole = time.monotonic() + self.limits.receive_seconds, False

        async def bounded() -> Message:
            nonlocal whole
            if whole:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(until - time.monotonic(), 0.001))
            except TimeoutError:
                raise ApiError(408, "The request came too slowly", code="timeout") from None
            if message["type"] != "http.request":
                whole = message["type"].startswith("websocket")
                return message
            size = len(message.get("body", b""))
            asked.held += size
            self.bytes += size
            whole = not message.get("more_body", False)
            if asked.held > self.limits.body:
                raise self._too_large()
            if self.bytes > self.limits.bodies:
                what = "The requests under way fill the server's memory for them"
                raise ApiError(503, what, "server_error", "overloaded")
            return message

        return bounded

    def _named(self, send: Send, asked: Asked, status: list[int]) -> Send:
        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                status.append(message["status"])
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = asked.id
                for name, value in POLICY.items():
                    headers[name] = value
            elif message["type"] == "websocket.accept":
                status.append(101)
            await send(message)

        return named

    def _tell(self, scope: Scope, path: str, asked: Asked, status: int, seconds: float) -> None:
        paged = path == PAGE or path.startswith(f"{PAGE}/")
        # What was refused before it was routed has none; its path is ours only if we serve it.
        own = path if path in self.routes else UNKNOWN
        route = PAGE if paged else getattr(scope.get("route"), "path", own)
        method = scope.get("method", "WS")
        self.metrics.answered(route, status, seconds)
        if self.log is None or (route in (*OPEN, PAGE) and status < 400):
            return
        words = {"id": asked.id, "status": status, "seconds": f"{seconds:.3f}", "bytes": asked.held}
        told = " ".join(f"{name}={value}" for name, value in (words | asked.notes).items())
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        print(f"{stamp} {method} {route} {told}", file=self.log, flush=True)

    def _trace(self, asked: Asked) -> None:
        """A defect's place in the log: where it happened, and not what with."""
        kind, _, where = sys.exc_info()
        if self.log is None or kind is None:
            return
        frames = "".join(traceback.format_tb(where)[-8:])
        print(f"defect id={asked.id} {kind.__name__}\n{frames}", file=self.log, flush=True)


def _is_disconnect(error: Exception) -> bool:
    return type(error).__name__ in ("ClientDisconnect", "WebSocketDisconnect")
