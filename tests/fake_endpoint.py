"""An OpenAI-compatible endpoint that translates by a hash, and fails as real ones do."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "sk-secret-0123456789"


def chinese(text: str) -> str:
    """Chinese characters that stand for a text, case, spaces and punctuation aside."""
    said = "".join(sign for sign in text.lower() if sign.isalnum())
    return "".join(chr(0x4E00 + byte) for byte in hashlib.sha256(said.encode()).digest()[:6])


class Fake(ThreadingHTTPServer):
    """The server; `plan` names what the next requests meet, `pause` is its Retry-After.

    Attributes:
      asked: the texts of every request that came, in order.
      keys: what the requests carried as authorization.
    """

    daemon_threads = True

    def __init__(self, plan: list[str], pause: str):
        super().__init__(("127.0.0.1", 0), Handler)
        self.plan, self.pause = list(plan), pause
        self.asked: list[list[str]] = []
        self.keys: list[str | None] = []
        self.delay = 0.0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        """Its address, as `--endpoint` takes it."""
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    server: Fake

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/v1/chat/completions" and body["model"] == "fake", (self.path, body)
        texts = json.loads(body["messages"][-1]["content"])
        with self.server.lock:
            self.server.asked.append(list(texts.values()))
            self.server.keys.append(self.headers.get("Authorization"))
            step = self.server.plan.pop(0) if self.server.plan else ""
        time.sleep(self.server.delay)
        said = {number: chinese(text) for number, text in texts.items()}
        getattr(self, f"do_{step}" if step and not step.isdigit() else "do_answer")(said, step)

    def do_answer(self, said: dict[str, str], step: str) -> None:
        if step:
            headers = {"Retry-After": self.server.pause} if step == "429" else {}
            told = f"no: {self.headers.get('Authorization')}"
            self.send(int(step), json.dumps({"error": {"message": told}}), headers)
        else:
            self.complete(json.dumps(said, ensure_ascii=False))

    def do_late(self, said: dict[str, str], _: str) -> None:
        time.sleep(1.5)
        with contextlib.suppress(OSError):
            self.complete(json.dumps(said))

    def do_drip(self, *_: object) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        with contextlib.suppress(OSError):
            for _ in range(20):
                self.wfile.write(b" ")
                time.sleep(0.1)

    def do_dropped(self, *_: object) -> None:
        self.close_connection = True
        self.connection.close()

    def do_short(self, said: dict[str, str], _: str) -> None:
        self.send(200, "{", {"Content-Length": "5000"})
        self.close_connection = True

    def do_page(self, *_: object) -> None:
        self.send(200, "<html>Bad gateway</html>")

    def do_prose(self, *_: object) -> None:
        self.complete("Sure! Here are your translations.")

    def do_merged(self, said: dict[str, str], _: str) -> None:
        self.complete(json.dumps(dict(list(said.items())[1:])))

    def do_fenced(self, said: dict[str, str], _: str) -> None:
        self.complete(f"<think>{{1}}</think>\n```json\n{json.dumps(said)}\n```")

    def do_cut(self, said: dict[str, str], _: str) -> None:
        self.complete(json.dumps(said)[:9], finish_reason="length")

    def do_elsewhere(self, *_: object) -> None:
        self.send(307, "", {"Location": "http://127.0.0.1:1/v1/chat/completions"})

    def complete(self, content: str, finish_reason: str = "stop") -> None:
        """A chat completion of 10 tokens in and 7 out."""
        choice = {"message": {"role": "assistant", "content": content}}
        usage = {"prompt_tokens": 10, "completion_tokens": 7}
        made = {"choices": [{**choice, "finish_reason": finish_reason}], "usage": usage}
        self.send(200, json.dumps(made))

    def send(self, state: int, body: str, headers: dict[str, str] | None = None) -> None:
        """A reply."""
        content = body.encode()
        self.send_response(state)
        for name, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


@contextlib.contextmanager
def serving(*plan: str, pause: str = "0") -> Iterator[Fake]:
    """A server for the block."""
    server = Fake(list(plan), pause)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
