"""Errors in the form that OpenAI's clients read: `{"error": {message, type, param, code}}`."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from xllm_jax.core.errors import UserError
from xllm_jax.data.record import DoesNotFit
from xllm_jax.serve.request import Refused

INVALID = "invalid_request_error"
RETRY_SECONDS = "1"
MOST = 500  # characters of a message
# Which part of a request a medium came from; its name begins with the request's own key.
PLACE = re.compile(r"[0-9a-f]{32}/(?P<place>[\w.\[\]]+)")


@dataclasses.dataclass
class ApiError(Exception):
    """What a client is told instead of an answer.

    Attributes:
      status: of HTTP.
      message: what is wrong, in words that hold nothing of other requests.
      kind: OpenAI's `type`.
      code: for programs.
      param: the field of the request that is wrong.
    """

    status: int
    message: str
    kind: str = INVALID
    code: str | None = None
    param: str | None = None

    def body(self) -> dict[str, Any]:
        """The JSON that says so."""
        message = "".join(sign if sign.isprintable() else " " for sign in self.message)[:MOST]
        told = {"message": message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": told}

    def headers(self) -> dict[str, str]:
        """Of the response."""
        found = {"cache-control": "no-store"}
        if self.status in (429, 503):
            found["retry-after"] = RETRY_SECONDS
        if self.status in (408, 413):  # the rest of the body is not read
            found["connection"] = "close"
        if self.status == 401:
            found["www-authenticate"] = "Bearer"
        return found


def of(error: UserError) -> ApiError:
    """What a client is told of an error of the engine or of a decoder."""
    if isinstance(error, Refused):
        busy = error.status == 429
        kind, code = ("rate_limit_error", "queue_full") if busy else ("server_error", "unavailable")
        return ApiError(
            error.status, ": ".join(filter(None, (error.field, error.what))), kind, code
        )
    if isinstance(error, DoesNotFit):
        what = f"The chat {error.what}. Leave some out, or start the server with a larger --length"
        return ApiError(400, what, code="context_length_exceeded", param="messages")
    found = PLACE.search(error.field)
    message = PLACE.sub(lambda match: match["place"], str(error))
    param = found["place"] if found else error.field or None
    return ApiError(400, message, code="invalid_value", param=param)


def unexpected(request: str) -> ApiError:
    """What a client is told of a defect of ours: where to look for it, and nothing else.

    Args:
      request: its name in the log.
    """
    return ApiError(500, f"Something went wrong (request {request})", "server_error", "internal")


def wrong(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """A request that cannot be answered as it is."""
    return ApiError(400, message, code=code, param=param)
