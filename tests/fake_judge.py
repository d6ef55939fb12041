"""A judge behind an OpenAI-compatible API that gives points by rule, and fails as real ones do."""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ANSWERS = re.compile(r"\[Assistant [12]\]\n(.*?)\n\n\[End of Assistant", re.S)
Rule = Callable[[str, str], object]  # of the two answers to a reply, or an HTTP state, or 'late'


class Fake(ThreadingHTTPServer):
    """The server.

    Attributes:
      rule: what answers.
      asked: the user's content of every request, in order.
      systems: the system messages.
    """

    daemon_threads = True

    def __init__(self, rule: Rule):
        super().__init__(("127.0.0.1", 0), Handler)
        self.rule, self.asked, self.systems = rule, [], set()
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    """Judges one pair."""

    server: Fake

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        system, user = (message["content"] for message in body["messages"])
        with self.server.lock:
            self.server.asked.append(user)
            self.server.systems.add(system)
        found = ANSWERS.findall(user)
        said = self.server.rule(*found) if len(found) == 2 else self.server.rule(user, "")
        if said == "late":
            time.sleep(1.5)
        state = said if isinstance(said, int) else 200
        message = {"role": "assistant", "content": said if isinstance(said, str) else None}
        made = {"choices": [{"message": message, "finish_reason": "stop"}]}
        content = json.dumps(made if state == 200 else {"error": {"message": "no"}}).encode()
        with contextlib.suppress(OSError):
            self.send_response(state)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)


@contextlib.contextmanager
def serving(rule: Rule) -> Iterator[Fake]:
    """A server for the block."""
    server = Fake(rule)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
