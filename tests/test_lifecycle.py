"""A server's beginning and end: what runs finishes, nothing new begins, the second signal ends."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest
import served

from xllm_jax.core.errors import UserError
from xllm_jax.serve import lifecycle

WAIT = 180  # seconds, on a busy machine
SCRIPT = Path(__file__).parent / "fake_server.py"


@contextlib.contextmanager
def process(pause: float = 0.02, warm_up: float = 0.0, word: str = "works"):
    """(process, address) of a server that listens."""
    command = [sys.executable, str(SCRIPT), str(pause), str(warm_up), word]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as started:
        try:
            assert started.stdout is not None
            yield started, started.stdout.readline().strip()
        finally:
            started.kill()


def ready(url: str) -> int:
    """The status of `/ready`; 0 where nobody listens."""
    host, _, port = url.removeprefix("http://").partition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=WAIT)
    with contextlib.closing(connection), contextlib.suppress(OSError):
        connection.request("GET", "/ready")
        return connection.getresponse().status
    return 0


def stream(url: str, words: str):
    body = {"stream": True, "temperature": 0, "messages": [{"role": "user", "content": words}]}
    return httpx2.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=WAIT)


def pieces(lines) -> str:
    found = [line.removeprefix("data: ") for line in lines if line.startswith("data: {")]
    return "".join(json.loads(one)["choices"][0]["delta"].get("content", "") for one in found)


def test_sigterm_lets_a_stream_finish_and_exits_with_0():
    """Beside an idle connection that stays open, as a page in a browser has one."""
    with process() as (started, url), httpx2.Client(timeout=WAIT) as idle:
        served.wait_for(lambda: ready(url) == 200, WAIT)
        idle.get(f"{url}/health")
        with stream(url, "a" * 100) as answer:
            lines = answer.iter_lines()
            begun = next(line for line in lines if "content" in line)
            started.send_signal(signal.SIGTERM)
            text = pieces([begun, *lines])
        assert text == f"ANSWER|{'a' * 100}|"
        assert started.wait(WAIT) == 0
        assert ready(url) == 0 and "again: at once" in started.stderr.read()


def test_a_second_signal_ends_it_at_once():
    with process(pause=1.0) as (started, url):
        served.wait_for(lambda: ready(url) == 200, WAIT)
        with stream(url, "a" * 100) as answer:
            lines = answer.iter_lines()  # kept, for the stream ends with it
            next(lines)
            started.send_signal(signal.SIGTERM)
            served.wait_for(lambda: ready(url) != 200, WAIT)
            assert started.poll() is None
            started.send_signal(signal.SIGTERM)
            assert started.wait(WAIT) == 128 + signal.SIGTERM


def test_it_lives_while_it_warms_up_and_a_warm_up_that_fails_ends_it():
    with process(warm_up=2.0, word="fails") as (started, url):
        served.wait_for(lambda: ready(url) == 503, WAIT)
        assert httpx2.get(f"{url}/health").status_code == 200
        with stream(url, "a") as answer:
            assert answer.status_code == 503
        assert started.wait(WAIT) == 1 and "no device" in started.stderr.read()


def test_a_port_that_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match="--port: cannot listen"):
            lifecycle.listen("127.0.0.1", port)
    with pytest.raises(UserError, match="--port"):
        lifecycle.listen("no.such.host.invalid", 0)
