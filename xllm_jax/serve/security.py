"""Who may ask: keys, and which pages of a browser.

A browser sends requests for any page that it shows, to servers on its own machine, too. So a
request must name this server (`Host`), which a name that was made to mean 127.0.0.1 does not, and a
page of another origin is refused.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import secrets
import urllib.parse
from collections.abc import Collection, Mapping
from pathlib import Path

from xllm_jax.core import bounded
from xllm_jax.core.errors import UserError
from xllm_jax.core.text_lines import split_lines
from xllm_jax.serve.errors import ApiError

MOST_KEYS = 10_000
SHORTEST = 16  # characters of a key
PROTOCOL = "openai-insecure-api-key."  # a browser's WebSocket carries its key in the protocol


class Keys:
    """The keys that open the server; without any, everybody may ask.

    Keys are compared as their hashes, all of them and to the last byte, whatever is given.

    Args:
      keys: they.
    """

    def __init__(self, keys: Collection[str] = ()):
        self._hashes = [_hash(key) for key in keys]
        self._inside = secrets.token_urlsafe(32)

    @property
    def required(self) -> bool:
        """Whether a key is needed."""
        return bool(self._hashes)

    @property
    def inside(self) -> str:
        """A key of this process, for its own page; it is written nowhere."""
        return self._inside

    def allow(self, key: str) -> bool:
        """Whether a key is one of these."""
        given, found = _hash(key), False
        for known in (*self._hashes, _hash(self._inside)):
            found |= hmac.compare_digest(given, known)
        return found

    def check(self, headers: Mapping[str, str]) -> None:
        """Looks at the key of a request.

        Args:
          headers: of the request.

        Raises:
          ApiError: 401, there is none or a wrong one.
        """
        if not self.required:
            return
        given = [_bearer(headers.get("authorization", ""))]
        offered = headers.get("sec-websocket-protocol", "").split(",")
        given += [one.strip().removeprefix(PROTOCOL) for one in offered if PROTOCOL in one]
        if not any([self.allow(key) for key in given if key]):
            what = "Give a key of this server as 'Authorization: Bearer KEY'"
            raise ApiError(401, what, "authentication_error", "invalid_api_key")

    @classmethod
    def load(cls, path: str | Path) -> Keys:
        """The keys of a file, one a line; empty lines and those that begin with # are none.

        Raises:
          UserError: no such file, or a key that is too short or not of printable ASCII.
        """
        field, hint = "--api_key_file", "Write one key a line, such as: openssl rand -hex 32"
        try:
            text = bounded.read_text(Path(path))
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({error})", field=field, hint=hint) from None
        keys = [line.strip() for line in split_lines(text)]
        keys = [key for key in keys if key and not key.startswith("#")]
        if not 0 < len(keys) <= MOST_KEYS:
            raise UserError(f"{path} holds {len(keys)} keys", field=field, hint=hint)
        for number, key in enumerate(keys, 1):
            if len(key) < SHORTEST or not all("!" <= sign <= "~" for sign in key):
                what = f"key {number} of {path} has fewer than {SHORTEST} characters, or others"
                raise UserError(f"{what} than printable ASCII", field=field, hint=hint)
        return cls(keys)


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _bearer(header: str) -> str:
    kind, _, key = header.partition(" ")
    return key.strip() if kind.lower() == "bearer" else ""


@dataclasses.dataclass(frozen=True)
class Names:
    """The names that a request may call this server by, and the pages that may ask it.

    Attributes:
      hosts: without ports, lower case; '*' takes any.
      origins: 'https://example.org' of further pages; '*' takes any.
    """

    hosts: frozenset[str]
    origins: frozenset[str] = frozenset()

    def check(self, headers: Mapping[str, str]) -> None:
        """Looks at where a request was sent to, and from which page.

        Raises:
          ApiError: 403, another name, or a page of another origin.
        """
        host = _name(headers.get("host", ""))
        if "*" not in self.hosts and host not in self.hosts:
            what = "The Host header names another server (see --server_names)"
            raise ApiError(403, what, "permission_error", "wrong_host")
        origin = headers.get("origin")
        if origin is None or "*" in self.origins or origin in self.origins:
            return
        if urllib.parse.urlsplit(origin).netloc.lower() != headers.get("host", "").lower():
            what = "Pages of other origins may not ask this server (see --origins)"
            raise ApiError(403, what, "permission_error", "wrong_origin")


def _name(host: str) -> str:
    """'example.org' of 'example.org:8000', '::1' of '[::1]:8000'."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()
