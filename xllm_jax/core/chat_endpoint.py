"""Requests to any OpenAI-compatible API, `POST URL/chat/completions`, sent until they are answered.

The standard library does the few requests of this file; a client of its own would bring its own
retries, and its logs.
"""

from __future__ import annotations

import dataclasses
import email.utils
import http.client
import json
import math
import os
import random
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from xllm_jax.core import bounded
from xllm_jax.core.errors import UserError

KEY = "OPENAI_API_KEY"  # environment variable
AGAIN = (408, 409, 425, 429, 500, 502, 503, 504, 529)  # HTTP states that pass
REFUSED = (400, 413, 422)  # states of an endpoint that does not want these texts
ATTEMPTS, PATIENT = 8, 40  # failures in a row that end the run; PATIENT of them are rate limits
LONGEST_WAIT = 60.0  # seconds
LARGEST = 1 << 24  # bytes of a reply
LONGEST_KEY = 1 << 16  # bytes of its file
CONTINUES = "What was answered is kept: the same command continues"


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """An API, and what it costs.

    Attributes:
      url: of the API, such as https://api.openai.com/v1 or http://localhost:8000/v1.
      model: its name there.
      key_file: file that holds the key; '' takes the environment variable OPENAI_API_KEY, if it is
        there: many servers of one's own need none.
      prices: 'INPUT,OUTPUT' of a million tokens, in any currency; '' counts tokens alone.
      request: further fields of the requests.
      parallel: requests under way at a time, where Beam does not decide.
      timeout: seconds that a whole reply may take.
      wait: seconds before the second attempt; each further wait is twice as long.
      attempts: failures in a row after which a request is given up.

    Raises:
      UserError: no web address, one that holds a secret, no model, or no such prices.
    """

    url: str
    model: str = ""
    key_file: str = ""
    prices: str = ""
    request: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"temperature": 0})
    parallel: int = 8
    timeout: float = 120.0
    wait: float = 1.0
    attempts: int = ATTEMPTS

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:  # half an IPv6 address, a port beyond 65535
            known = False
        if not known or not self.url.isascii() or not self.url.isprintable() or " " in self.url:
            hint = "Such as http://localhost:8000/v1"
            raise UserError("is no address of an API", field="--endpoint", hint=hint)
        if parts.username or parts.password or parts.query:
            hint = f"Put a key into {KEY} or a file, --key_file"
            raise UserError("holds more than an address", field="--endpoint", hint=hint)
        if not self.model:
            raise UserError(
                "an endpoint needs it", field="--model", hint="As the endpoint calls it"
            )
        self.price()

    def price(self) -> tuple[float, float] | None:
        """(of an input token, of an output token)."""
        if not self.prices:
            return None
        try:
            given, made = (float(text) / 1e6 for text in self.prices.split(","))
            if not (0 <= given < math.inf and 0 <= made < math.inf):
                raise ValueError
        except ValueError:
            hint = "INPUT,OUTPUT of a million tokens: 0.15,0.60"
            raise UserError(f"{self.prices!r} are no prices", field="--prices", hint=hint) from None
        return given, made

    def key(self) -> str:
        """The key, '' without one.

        Raises:
          UserError: no such file, or one that holds something else.
        """
        if not self.key_file:
            return os.environ.get(KEY, "").strip()
        try:
            found = bounded.read_bytes(Path(self.key_file), LONGEST_KEY).decode("utf-8").strip()
        except (OSError, ValueError):
            raise UserError("cannot be read", field="--key_file", hint=self.key_file) from None
        if not found.isascii() or not found.isprintable() or " " in found or not found:
            raise UserError("holds no key", field="--key_file", hint="The key, and nothing else")
        return found


class Passing(Exception):
    """A failure after which the same request may succeed; `after` seconds, if it is known."""

    def __init__(self, why: str, after: float | None = None):
        super().__init__(why)
        self.why, self.after = why, after


class Refused(Exception):
    """The endpoint does not want these texts."""


class GivenUp(UserError):
    """A request that failed too often; the endpoint may answer others, or this one later."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Redirected requests would take the key along to any host."""

    def redirect_request(self, *_: object) -> None:
        return None


class Client:
    """Sends requests until they are answered. It may go to other processes; a key never does."""

    def __init__(self, about: Endpoint):
        self._about, self._stopped = about, threading.Event()
        self._opener = urllib.request.build_opener(_NoRedirect)

    def __getstate__(self) -> dict[str, Any]:
        return {"_about": self._about}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["_about"])

    def stop(self) -> None:
        """Ends the waits of all threads."""
        self._stopped.set()

    def ask(self, messages: Sequence[Mapping[str, str]]) -> tuple[dict[str, Any], list[str]]:
        """(the reply, why it was asked for again and again).

        Args:
          messages: {'role', 'content'} each.

        Raises:
          UserError: the endpoint cannot be used.
          GivenUp: it fails too often.
          Refused: it does not want this content.
        """
        failed: list[str] = []
        while True:
            try:
                return self._post(messages), failed
            except Passing as error:
                failed.append(error.why)
                limited = failed.count("429")
                over = limited >= PATIENT or len(failed) - limited >= self._about.attempts
                if over or self._stopped.wait(self._pause(len(failed), error.after)):
                    what = f"fails at attempt {len(failed)}: {error.why}"
                    raise GivenUp(what, field=self._about.url, hint=CONTINUES) from None

    def _pause(self, failures: int, after: float | None) -> float:
        grown = self._about.wait * 2 ** min(failures - 1, 10)
        wanted = grown * random.uniform(0.5, 1) if after is None else after + 0.1 * self._about.wait
        return min(max(wanted, 0), LONGEST_WAIT)

    def _post(self, messages: Sequence[Mapping[str, str]]) -> dict[str, Any]:
        url = self._about.url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        body = {"model": self._about.model, "messages": list(messages), **self._about.request}
        headers = {"Content-Type": "application/json"}
        key = self._about.key()
        if key:
            headers["Authorization"] = f"Bearer {key}"
        asked = urllib.request.Request(url, json.dumps(body).encode(), headers, method="POST")
        try:
            with self._opener.open(asked, timeout=self._about.timeout) as reply:
                return _reply(_read(reply, self._about.timeout))
        except urllib.error.HTTPError as error:
            with error:  # its connection stays open else
                raise self._judged(error, key) from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, ssl.SSLCertVerificationError):
                what = f"its certificate is not trusted ({reason.verify_message})"
                raise UserError(what, field=self._about.url) from None
            late = isinstance(reason, TimeoutError)
            raise Passing("time-out" if late else f"{type(reason).__name__}") from None

    def _judged(self, error: urllib.error.HTTPError, key: str) -> Exception:
        """What an HTTP error means; its message never holds the key."""
        try:
            told = _read(error, self._about.timeout).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException, Passing):
            told = ""
        told = " ".join((told.replace(key, "[key]") if key else told).split())[:200]
        if error.code in AGAIN and "insufficient_quota" not in told:
            return Passing(str(error.code), _after(error.headers.get("Retry-After")))
        if error.code in REFUSED:
            return Refused(f"answers {error.code}: {told}")
        hints = {
            401: f"Put the key into {KEY} or a file, --key_file",
            404: "Check --endpoint and --model",
        }
        hint = hints.get(error.code, CONTINUES)
        return UserError(f"answers {error.code}: {told}", field=self._about.url, hint=hint)


def text(reply: Mapping[str, Any]) -> str:
    """What a reply says, without what a model has thought before; '' where it says nothing."""
    content = (reply["choices"][0].get("message") or {}).get("content")
    return content.rpartition("</think>")[2] if isinstance(content, str) else ""


def _read(reply: Any, seconds: float) -> bytes:
    """The body of a reply, within a time and a size, however slowly it drips."""
    found, end = b"", time.monotonic() + seconds
    while piece := reply.read1(1 << 16):
        found += piece
        if time.monotonic() > end:
            raise Passing("time-out")
        if len(found) > LARGEST:
            raise Passing(f"a reply of more than {LARGEST >> 20} MiB")
    if reply.length:  # what the header has promised and nobody has sent
        raise Passing("a reply that is cut off")
    return found


def _reply(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body)
        usable = isinstance(found["choices"][0], dict)
    except (ValueError, KeyError, IndexError, TypeError):
        usable = False
    if not usable:
        raise Passing("no chat completion")
    return found


def _after(header: str | None) -> float | None:
    """Seconds that Retry-After asks for: a number, or a date."""
    try:
        return float(header or "")
    except ValueError:
        pass
    try:
        return email.utils.parsedate_to_datetime(header or "").timestamp() - time.time()
    except ValueError:
        return None
