"""Files by URL: from hosts that are allowed by name, at addresses that were looked at before.

A name is resolved once, all of its addresses must be public, and the connection goes to one of
those very addresses: a name that means another address a moment later (DNS rebinding) changes
nothing. A redirect is a URL like the first. No proxy, cookie or password is ever used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Callable, Collection, Sequence

from xllm_jax.serve import addresses
from xllm_jax.serve.errors import ApiError, wrong

REDIRECTS = 3
PORTS = {"http": 80, "https": 443}
PIECE = 1 << 16
LONGEST = 4096  # characters of a URL

Resolve = Callable[[str, int], Sequence[str]]
Connect = Callable[[str, int, float], socket.socket]


def resolved(host: str, port: int) -> list[str]:
    """All addresses of a host.

    Raises:
      OSError: it has none.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def connected(address: str, port: int, seconds: float) -> socket.socket:
    """A connection to an address, not to a name."""
    return socket.create_connection((address, port), seconds)


@dataclasses.dataclass(frozen=True)
class Fetcher:
    """Fetches files from hosts on a list.

    Attributes:
      hosts: 'example.org', or 'example.org:8443' for another port than the scheme's own.
      most: bytes of a file.
      seconds: that a file may take, redirects included.
      resolve, connect: the network's.
    """

    hosts: Collection[str]
    most: int
    seconds: float
    resolve: Resolve = resolved
    connect: Connect = connected

    def __call__(self, url: str, param: str) -> bytes:
        """What is at a URL.

        Args:
          url: of http or https.
          param: the field of the request that holds it.

        Raises:
          ApiError: its host is not allowed, or is none of the public internet; it is too large or
            too slow; or the server there answers with anything but 200.
        """
        until = time.monotonic() + self.seconds
        for _ in range(REDIRECTS + 1):
            found = self._once(url, param, until)
            if isinstance(found, bytes):
                return found
            url = urllib.parse.urljoin(url, found)
        raise _refused(f"leads on more than {REDIRECTS} times", param)

    def _once(self, url: str, param: str, until: float) -> bytes | str:
        """The file, or where a redirect leads."""
        scheme, host, port, target = self._place(url, param)
        try:
            opened = self._open(scheme, host, port, param, until)
        except OSError:  # also what ssl raises
            raise _refused("cannot be reached", param) from None
        connection = http.client.HTTPConnection(host, port)
        connection.sock = opened
        # However slowly the bytes of its head and body come.
        late = threading.Timer(max(until - time.monotonic(), 0), _end, (opened,))
        late.daemon = True
        late.start()
        try:
            named = host if port == PORTS[scheme] else f"{host}:{port}"
            sent = {"Host": named, "Accept-Encoding": "identity", "User-Agent": "xllm"}
            connection.request("GET", target, headers=sent)
            answer = connection.getresponse()
            if answer.status in (301, 302, 303, 307, 308):
                return answer.headers.get("Location") or url
            if answer.status != 200:
                raise _refused(f"was answered with {answer.status}", param)
            return self._read(answer, param, until)
        except (OSError, http.client.HTTPException, ValueError):
            raise _refused("cannot be fetched", param) from None
        finally:
            late.cancel()
            connection.close()
            opened.close()

    def _place(self, url: str, param: str) -> tuple[str, str, int, str]:
        """(scheme, host, port, path and query) of a URL that is allowed."""
        try:
            parts = urllib.parse.urlsplit(url)
            host, port = parts.hostname or "", parts.port
        except ValueError:
            raise _refused("is no URL", param) from None
        if len(url) > LONGEST or any(not "!" <= sign <= "~" for sign in url):
            raise _refused("is no URL", param)
        if parts.scheme not in PORTS:
            raise _refused("is of another scheme than http, https and data", param)
        if parts.username is not None or parts.password is not None:
            raise _refused("holds a password", param)
        port = PORTS[parts.scheme] if port is None else port
        plain = port == PORTS[parts.scheme] and host in self.hosts
        if not host or not (plain or f"{host}:{port}" in self.hosts):
            raise _refused("is of a host that this server does not fetch from", param)
        target = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
        return parts.scheme, host, port, target

    def _open(self, scheme: str, host: str, port: int, param: str, until: float) -> socket.socket:
        found = self.resolve(host, port)
        if not found or not all(map(addresses.is_public, found)):
            raise _refused("is of a host that is not on the public internet", param)
        opened = self.connect(found[0], port, _left(until, param))
        if scheme == "http":
            return opened
        opened.settimeout(_left(until, param))
        return ssl.create_default_context().wrap_socket(opened, server_hostname=host)

    def _read(self, answer: http.client.HTTPResponse, param: str, until: float) -> bytes:
        if answer.headers.get("Content-Encoding", "identity") != "identity":
            raise _refused("comes packed", param)
        pieces, size = [], 0
        while True:
            _left(until, param)
            piece = answer.read1(PIECE)
            if not piece:
                break
            pieces.append(piece)
            size += len(piece)
            if size > self.most:
                raise ApiError(413, f"{param}: has more than {self.most:,} bytes", param=param)
        if answer.length:
            raise _refused("ends too early", param)
        return b"".join(pieces)


def _end(opened: socket.socket) -> None:
    with contextlib.suppress(OSError):
        opened.shutdown(socket.SHUT_RDWR)


def _left(until: float, param: str) -> float:
    left = until - time.monotonic()
    if left <= 0:
        raise _refused("takes too long", param)
    return left


def _refused(what: str, param: str) -> ApiError:
    return wrong(f"{param}: the URL {what}", param, "invalid_url")
