"""A host that meets something else than host 0 at the address says so, and may be started again."""

from __future__ import annotations

import socketserver
import sys
import threading

import forked
import host_runs

CODE = """
from xllm_jax.core import hosts
from xllm_jax.launch import cli
cli.run(lambda _: hosts.join('127.0.0.1:{port}', 2, {index}, seconds=5))
"""


class Strange(socketserver.BaseRequestHandler):
    """Some other server, or one of a run that has ended."""

    def handle(self):
        self.request.recv(100)
        self.request.sendall(b"HTTP/1.0 200 OK\r\n\r\nhello")


def joined(port: int, index: int) -> tuple[int, str]:
    """(exit code, last line) of a host that joins."""
    command = (sys.executable, "-c", CODE.format(port=port, index=index))
    done = forked.run(command, capture_output=True, text=True, cwd=host_runs.ROOT)
    return done.returncode, done.stderr.splitlines()[-1]


def test_another_server_at_the_address_is_told(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Strange) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_address[1]
        code, line = joined(port, 1)
        assert (code, f"127.0.0.1:{port} is no host 0 of this run" in line) == (76, True), line
        code, line = joined(port, 0)
        assert (code, f"port {port} cannot be opened here" in line) == (2, True), line
        server.shutdown()
