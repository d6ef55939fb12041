"""The plugin of lmms-eval: what it sends is what our server reads, and failures are bounded."""

from __future__ import annotations

import base64
import importlib
import json
import sys
import threading
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import reader_fixtures as fixtures
from PIL import Image

from xllm_jax.serve import conversation
from xllm_jax.serve.limits import Limits

FOLDER = Path(__file__).parents[1] / "integrations/lmms_eval"


class Base:
    """What the plugin needs of lmms-eval's own base class."""

    def __init__(self):
        self.task_dict = {}


@pytest.fixture
def plugin(monkeypatch):
    """The plugin's modules, beside a stand-in of lmms-eval."""
    monkeypatch.syspath_prepend(str(FOLDER))
    named = {name: types.ModuleType(name) for name in ("lmms_eval", "lmms_eval.api")}
    named["lmms_eval.api.model"] = types.ModuleType("lmms_eval.api.model")
    named["lmms_eval.api.model"].lmms = Base
    for name, module in named.items():
        monkeypatch.setitem(sys.modules, name, module)
    for name in [n for n in sys.modules if n.startswith("lmms_eval_xllm")]:
        monkeypatch.delitem(sys.modules, name)
    found = [importlib.import_module(f"lmms_eval_xllm.{name}") for name in ("parts", "model")]
    yield types.SimpleNamespace(parts=found[0], model=found[1])
    for name in [n for n in sys.modules if n.startswith("lmms_eval_xllm")]:
        sys.modules.pop(name)


def asked(tmp_path) -> list[dict]:
    """A message with every kind of medium that lmms-eval gives."""
    fixtures.sound(tmp_path / "a.wav")
    fixtures.film(tmp_path / "v.mp4")
    sound = {"array": np.zeros(1600), "sampling_rate": 16000}
    content = [
        {"type": "image", "url": Image.new("RGB", (8, 6), (1, 2, 3))},
        {"type": "video", "url": str(tmp_path / "v.mp4")},
        {"type": "audio", "url": str(tmp_path / "a.wav")},
        {"type": "audio", "url": sound},
        {"type": "text", "text": "图中有什么？"},
    ]
    return [{"role": "user", "content": content}]


def test_our_server_reads_what_is_sent(plugin, tmp_path):
    sent = plugin.parts.messages(asked(tmp_path))
    said = conversation.read(sent, {"image", "video", "speech"}, Limits())
    assert [part.modality for part in said.parts] == ["image", "video", "speech", "speech"]
    assert said.rounds[-1][0].strip() == "图中有什么？"
    assert {part["input_audio"]["format"] for part in sent[0]["content"][2:4]} == {"wav"}
    urls = sent[0]["content"][1]["video_url"]["url"]
    whole = base64.b64decode(urls.removeprefix("data:video/mp4;base64,"))
    assert whole == (tmp_path / "v.mp4").read_bytes()
    for wrong in ({"type": "table", "url": "x"}, {"type": "image", "url": 3}):
        with pytest.raises(ValueError):
            plugin.parts.part(wrong)


class Server(ThreadingHTTPServer):
    """Answers with what it was asked; the first requests meet what `plan` says."""

    def __init__(self, plan: list[int]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.plan, self.bodies = plan, []


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.reply(200, {"data": [{"id": "mini"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        state = self.server.plan.pop(0) if self.server.plan else 200
        if state == 200:
            self.server.bodies.append(body)
        text = body["messages"][-1]["content"][-1]["text"]
        self.reply(state, {"choices": [{"message": {"content": f"答{text}"}}]})

    def reply(self, state: int, said: dict) -> None:
        content = json.dumps(said).encode()
        self.send_response(state)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def serving():
    servers = []

    def start(*plan: int) -> tuple[Server, str]:
        server = Server(list(plan))
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        return server, f"http://127.0.0.1:{server.server_address[1]}/v1"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def requests(model, count: int, **options) -> list:
    """lmms-eval's requests about its documents."""
    model.task_dict = {"task": {"test": [f"问{n}" for n in range(count)]}}

    def to_messages(doc: str) -> list[dict]:
        return [{"role": "user", "content": [{"type": "text", "text": doc}]}]

    rows = [("", to_messages, options, n, "task", "test") for n in range(count)]
    return [types.SimpleNamespace(args=row) for row in rows]


def test_answers_come_in_order_with_the_tasks_options(plugin, serving, monkeypatch):
    monkeypatch.setattr(plugin.model.time, "sleep", lambda _: None)
    server, url = serving(503, 429)
    model = plugin.model.XLLM(base_url=url, num_concurrent=3)
    found = model.generate_until(requests(model, 7, max_new_tokens=9, until=["\n"]))
    assert found == [f"答问{n}" for n in range(7)]
    assert {body["model"] for body in server.bodies} == {"mini"}
    body = server.bodies[0]
    assert (body["max_tokens"], body["temperature"], body["stop"]) == (9, 0.0, ["\n"])
    assert model.generate_until([]) == []


def test_failures_end_the_evaluation(plugin, serving, monkeypatch):
    monkeypatch.setattr(plugin.model.time, "sleep", lambda _: None)
    server, url = serving(400)
    model = plugin.model.XLLM(base_url=url)
    with pytest.raises(RuntimeError, match="answers 400"):
        model.generate_until(requests(model, 1))
    server.plan[:] = [503] * 9
    model = plugin.model.XLLM(base_url=url, retries=2)
    with pytest.raises(RuntimeError, match="answers 503"):
        model.generate_until(requests(model, 1))
    assert len(server.plan) == 6
    with pytest.raises(NotImplementedError):
        model.loglikelihood([])
