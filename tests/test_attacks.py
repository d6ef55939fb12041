"""What a hostile client tries, and what it gets: a table of requests and their answers.

Behind every attack an ordinary request is answered as before, and no thread, slot or byte is held.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import socket
import struct
import threading
import time
import zlib

import gray_video
import httpx2
import pytest
import served

from xllm_jax.core.errors import UserError
from xllm_jax.serve.fetch import Fetcher
from xllm_jax.serve.security import Keys, Names

KEY = "sk-0123456789abcdef"
PATH = "/v1/chat/completions"
ASK = {"temperature": 0, "messages": [{"role": "user", "content": "a"}]}
ALLOWED = ("files.test", "inside.test", "mapped.test", "both.test", "none.test", "127.0.0.1")
PLACES = {
    "files.test": ["93.184.216.34"],
    "inside.test": ["10.1.2.3"],
    "mapped.test": ["::ffff:127.0.0.1"],
    "both.test": ["93.184.216.34", "169.254.169.254"],
    "127.0.0.1": ["127.0.0.1"],
}


class Net:
    """The internet of these tests: names, and a server behind the one public address."""

    def __init__(self):
        self.page, self.connected, self.resolved = b"", [], []

    def resolve(self, host, port):
        self.resolved.append(host)
        if host not in PLACES:
            raise OSError("no such host")
        return PLACES[host]

    def connect(self, address, port, seconds):
        self.connected.append((address, port))
        ours, theirs = socket.socketpair()
        threading.Thread(target=self._send, args=(theirs,), daemon=True).start()
        return ours

    def _send(self, theirs):
        with theirs, contextlib.suppress(OSError):  # who asked has enough
            self.asked = theirs.recv(65536)
            theirs.sendall(self.page)


@pytest.fixture(scope="module")
def net():
    return Net()


@pytest.fixture(scope="module")
def log():
    return io.StringIO()


@pytest.fixture(scope="module")
def server(net, log):
    fetch = Fetcher(ALLOWED, served.LIMITS.medium, 2.0, net.resolve, net.connect)
    with (
        served.decoders() as workers,
        served.fake(workers, keys=Keys([KEY]), fetch=fetch, log=log) as made,
    ):
        yield made


@pytest.fixture
def client(server):
    headers = {"authorization": f"Bearer {KEY}"}
    with httpx2.Client(base_url=server[0], headers=headers, timeout=60) as made:
        yield made
        answer = made.post(PATH, json=ASK)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["message"]["content"] == "ANSWER|a|"
        served.wait_for(lambda: not server[1].running)


def part(url: str, kind: str = "image_url") -> dict:
    content = [{"type": kind, kind: {"url": url}}, {"type": "text", "text": "a"}]
    return ASK | {"messages": [{"role": "user", "content": content}]}


def inline(content: bytes, kind: str = "image_url") -> dict:
    return part(f"data:image/png;base64,{base64.b64encode(content).decode()}", kind)


def refused(answer, status: int, code: str | None = None) -> str:
    """The message of a refusal in OpenAI's form."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert code is None or error["code"] == code, error
    return error["message"]


URLS = [
    ("file:///etc/passwd", "another scheme"),
    ("FILE:/etc/passwd", "another scheme"),
    ("ftp://files.test/a", "another scheme"),
    ("gopher://files.test/a", "another scheme"),
    ("javascript:alert(1)", "another scheme"),
    ("http://127.0.0.1/", "public internet"),  # although its name is allowed
    ("http://127.1/", "does not fetch from"),
    ("http://2130706433/", "does not fetch from"),
    ("http://0x7f.0.0.1/", "does not fetch from"),
    ("http://[::1]/", "does not fetch from"),
    ("http://localhost/", "does not fetch from"),
    ("http://169.254.169.254/latest/meta-data/", "does not fetch from"),
    ("http://10.0.0.1/", "does not fetch from"),
    ("http://inside.test/", "public internet"),
    ("http://mapped.test/", "public internet"),
    ("http://both.test/", "public internet"),
    ("http://none.test/", "cannot be reached"),
    ("http://other.test/", "does not fetch from"),
    ("http://files.test.evil.test/", "does not fetch from"),
    ("http://evil.test#files.test/", "does not fetch from"),
    ("http://files.test@evil.test/", "holds a password"),
    ("http://user:word@files.test/", "holds a password"),
    ("http://files.test:22/", "does not fetch from"),
    ("http://files.test:99999/", "is no URL"),
    ("http://[files.test/", "is no URL"),
    ("http://files.test/a\r\nX-Injected: 1", "is no URL"),
    ("http://files.test/\u2024", "is no URL"),
    ("http://files.test/" + "a" * 5000, "is no URL"),
    ("http:///a", "does not fetch from"),
]


@pytest.mark.parametrize("url, told", URLS, ids=[url[:40].strip() for url, _ in URLS])
def test_no_url_is_fetched_but_of_allowed_public_hosts(client, net, url, told):
    before = len(net.connected)
    assert told in refused(client.post(PATH, json=part(url)), 400, "invalid_url")
    assert len(net.connected) == before


def head(status: str, *lines: str) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", *lines, "", ""]).encode()


PAGES = [
    (head("302 Found", "Location: http://127.0.0.1/"), 400, "public internet"),
    (head("302 Found", "Location: http://169.254.169.254/"), 400, "that this server does not"),
    (head("301 Moved", "Location: file:///etc/passwd"), 400, "another scheme"),
    (head("302 Found", "Location: //inside.test/"), 400, "public internet"),
    (head("302 Found", "Location: /again"), 400, "leads on more than 3 times"),
    (head("302 Found"), 400, "leads on more than 3 times"),
    (head("404 Not Found"), 400, "was answered with 404"),
    (head("200 OK", "Content-Encoding: gzip") + b"x", 400, "comes packed"),
    (head("200 OK", "Content-Length: 9") + b"x", 400, "ends too early"),
    (head("200 OK", "Content-Length: -9") + b"", 400, "is empty"),
    (head("200 OK") + b"x" * 1_100_000, 413, "has more than 1,000,000 bytes"),
    (b"\x00\xff\r\n\r\n" * 9, 400, "cannot be fetched"),
    (head("200 OK", *[f"A{n}: b" for n in range(500)]), 400, "cannot be fetched"),
    (head("200 OK") + b"<html>", 400, "of no known format"),
]


@pytest.mark.parametrize("page, status, told", PAGES, ids=[told for _, _, told in PAGES])
def test_an_allowed_host_that_turns_hostile(client, net, monkeypatch, page, status, told):
    monkeypatch.setattr(net, "page", page)
    found = client.post(PATH, json=part("http://files.test/a.png"))
    assert told in refused(found, status)


def test_a_file_of_an_allowed_host_is_fetched_at_the_address_that_was_looked_at(client, net):
    """The name is resolved once: what it means a moment later changes nothing."""
    content = served.picture()
    net.page = head("200 OK", f"Content-Length: {len(content)}") + content
    net.resolved.clear(), net.connected.clear()
    found = client.post(PATH, json=part("http://files.test/a.png?b=c"))
    assert found.status_code == 200, found.text
    assert net.resolved == ["files.test"] and net.connected == [("93.184.216.34", 80)]
    asked = net.asked.decode()
    assert asked.startswith("GET /a.png?b=c HTTP/1.1\r\nHost: files.test\r\n")
    assert KEY not in asked


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be huge."""

    def chunk(name: bytes, content: bytes) -> bytes:
        made = name + content
        return struct.pack(">I", len(content)) + made + struct.pack(">I", zlib.crc32(made))

    size = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", size)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


FILES = [
    ("image_url", bomb(60_000, 60_000), "pixels"),
    ("image_url", bomb(400, 400), "has 160,000 pixels, more than 100,000"),
    ("image_url", b"", "is no text"),
    ("image_url", b"%!PS-Adobe-3.0 EPSF-3.0\n", "of no known format"),
    ("image_url", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "of no known format"),
    ("video_url", b"#EXTM3U\nfile:///etc/passwd\n", "of no known format"),
    ("video_url", b"ffconcat version 1.0\nfile /etc/passwd\n", "of no known format"),
    ("video_url", served.sound(), "it is a sound"),
    ("audio_url", served.picture(), "of no known format"),
    ("audio_url", served.sound(3.5), "seconds, more than 3"),
    ("audio_url", served.sound()[:30], "not a readable audio file"),
]


@pytest.mark.parametrize("kind, content, told", FILES, ids=[told for _, _, told in FILES])
def test_hostile_files(client, kind, content, told):
    body = inline(content, kind) if content else part("", kind)
    assert told in refused(client.post(PATH, json=body), 400)


def test_clips_that_are_too_long(client, tmp_path):
    for frames, rate, told in ((24, 8, "frames, more than 20"), (12, 2, "seconds, more than 5")):
        clip = gray_video.write(tmp_path / "v.mp4", frames, rate=rate).read_bytes()
        found = client.post(PATH, json=inline(clip, "video_url"))
        assert told in refused(found, 400, "file_too_large")


def test_too_many_files_and_too_large_ones(client):
    content = part("data:,a")["messages"][0]["content"] * 5
    many = ASK | {"messages": [{"role": "user", "content": content}]}
    refused(client.post(PATH, json=many), 400, "too_many_files")
    refused(client.post(PATH, json=inline(b"x" * 1_000_001)), 413, "file_too_large")


def test_names_of_files_lead_nowhere(client):
    for name in ("../../etc/passwd", "/etc/passwd", "a.png::0:10", "a.png#t=1,2", "con\0.png"):
        told = refused(client.post(PATH, json=part(name)), 400)
        assert "neither a data: URL nor base64" in told or "another scheme" in told


BODIES = [
    (b"", 400, "invalid_json"),
    (b"null", 400, "invalid_json"),
    (b"[" * 100_000, 400, "invalid_json"),
    (b'{"messages":' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"}", 400, "invalid_json"),
    (b'{"messages": "\xff\xfe"}', 400, "invalid_json"),
    (rb'{"messages": [{"role": "user", "content": "\ud800"}]}', 400, "invalid_json"),
    (json.dumps(ASK | {"temperature": float("nan")}).encode(), 400, "invalid_value"),
    (json.dumps(ASK | {"temperature": 2.1}).encode(), 400, "invalid_value"),
    (json.dumps(ASK | {"top_p": float("inf")}).encode(), 400, "invalid_value"),
    (json.dumps(ASK | {"temperature": "1"}).encode(), 400, "invalid_value"),
    (json.dumps(ASK | {"n": 10**18}).encode(), 400, "invalid_value"),
    (b'{"n": ' + b"9" * 5000 + b"}", 400, "invalid_json"),
    (json.dumps(ASK | {"messages": ASK["messages"] * 17}).encode(), 400, "invalid_value"),
    (json.dumps({"messages": [{"role": "user", "content": "a" * 5001}]}).encode(), 400, None),
    (b" " * 2_000_001, 413, "request_too_large"),
]


@pytest.mark.parametrize("body, status, code", BODIES, ids=range(len(BODIES)))
def test_hostile_bodies(client, body, status, code):
    found = client.post(PATH, content=body, headers={"content-type": "application/json"})
    refused(found, status, code)


def test_what_is_refused_at_the_gate_is_counted_at_its_route(client, log):
    """The route stands in the server's own table; another path is not told."""
    large = client.post(PATH, content=b" " * 2_000_001)
    other = client.post(f"{PATH}/mine", content=b" " * 2_000_001)
    assert large.status_code == other.status_code == 413
    lines = log.getvalue().splitlines()
    for found, route in ((large, PATH), (other, "unknown")):
        (line,) = (line for line in lines if found.headers["x-request-id"] in line)
        assert line.split(" ")[2] == route


def test_a_body_without_a_length_is_cut_off_at_the_limit(client):
    def endless():
        for _ in range(40):
            yield b" " * 100_000

    try:
        found = client.post(PATH, content=endless(), headers={"content-type": "application/json"})
    except httpx2.TransportError:  # the server stops reading, and the client goes on writing
        return
    refused(found, 413, "request_too_large")


def test_a_form_of_a_page_is_no_question(client):
    found = client.post(PATH, content=json.dumps(ASK), headers={"content-type": "text/plain"})
    refused(found, 415)


WRONG = ("", "Bearer", f"Bearer {KEY[:-1]}", f"Bearer {KEY}x", f"Basic {KEY}", KEY, "Bearer \xff")
PATHS = ((PATH, "POST"), ("/v1/models", "GET"), ("/metrics", "GET"), ("/v1/x", "GET"))


@pytest.mark.parametrize("header", WRONG)
def test_a_wrong_key(server, header):
    for path, method in PATHS:
        given = {"authorization": header.encode("latin-1")} if header else {}
        found = httpx2.request(method, f"{server[0]}{path}", headers=given)
        assert KEY not in refused(found, 401, "invalid_api_key")
    assert httpx2.get(f"{server[0]}/health").json() == {"status": "ok"}


@pytest.mark.parametrize(
    "headers, code",
    [
        ({"host": "evil.test"}, "wrong_host"),  # a name that an attacker lets mean 127.0.0.1
        ({"host": "127.0.0.1.evil.test"}, "wrong_host"),
        ({"origin": "http://evil.test"}, "wrong_origin"),
        ({"origin": "null"}, "wrong_origin"),
    ],
)
def test_pages_of_others(client, headers, code):
    refused(client.post(PATH, json=ASK, headers=headers), 403, code)


def raw(server, content: bytes, seconds: float = 5.0) -> bytes:
    """What the server sends for some bytes, until it closes or the time is over."""
    port = int(server[0].rpartition(":")[2])
    found = b""
    with socket.create_connection(("127.0.0.1", port), seconds) as opened:
        opened.sendall(content)
        try:
            while piece := opened.recv(65536):
                found += piece
        except OSError:  # nothing more comes, or the server has hung up
            pass
    return found


def test_headers_cannot_be_injected(client, server, log):
    """Nothing of a request's head comes back in one, or makes a line in the log."""
    path = f"/v1/%0d%0aX-Injected:%201%0a/{'%1b[31m'}"
    found = client.get(path, headers={"x-request-id": "mine"})
    refused(found, 404, "not_found")
    assert "x-injected" not in found.headers and found.headers["x-request-id"] != "mine"
    assert "Injected" not in log.getvalue() and "\x1b" not in log.getvalue()
    assert raw(server, b"GET / HTTP/1.1\r\nHost: a\r\n: b\r\n\r\n").startswith(b"HTTP/1.1 400")
    long = b"GET / HTTP/1.1\r\nHost: a\r\nA: " + b"b" * 200_000
    assert b" 200 " not in raw(server, long)
    both = b"Host: 127.0.0.1\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    behind = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    assert b" 200 " not in raw(server, b"POST / HTTP/1.1\r\n" + both + behind, 1.0)


def test_a_body_that_drips(server):
    head = f"POST {PATH} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {KEY}\r\n"
    head += "Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
    assert raw(server, head.encode(), 5.0).startswith(b"HTTP/1.1 408")


def test_a_stream_whose_reader_breaks_off(client, server):
    server[1].pause = 0.02
    try:
        message = {"role": "user", "content": "a" * 999}
        body = json.dumps(ASK | {"stream": True, "messages": [message]})
        head = f"POST {PATH} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {KEY}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}"
        port = int(server[0].rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as opened:
            opened.sendall(head.encode())
            assert opened.recv(20).startswith(b"HTTP/1.1 200")
            # Not a close but a reset, as of a machine that is gone.
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        served.wait_for(lambda: not server[1].running, 3)
    finally:
        server[1].pause = 0.0


def test_all_bodies_together_are_bounded(client, server):
    """Three slow clients hold what they have sent; the next one is told to come again."""
    port = int(server[0].rpartition(":")[2])
    head = f"POST {PATH} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {KEY}\r\n"
    head += "Content-Type: application/json\r\nContent-Length: 1900000\r\n\r\n"
    opened = [socket.create_connection(("127.0.0.1", port)) for _ in range(3)]
    try:
        for one in opened:
            one.sendall(head.encode() + b" " * 1_600_000)
        time.sleep(0.3)
        more = {"headers": {"content-type": "application/json"}, "content": b" " * 900_000}
        found = client.post(PATH, **more)
        refused(found, 503, "overloaded")
        assert found.headers["retry-after"] == "1"
    finally:
        for one in opened:
            one.close()
    time.sleep(0.2)


def test_a_defect_tells_nothing(client, server, log):
    """Neither the client nor the log sees what the request held."""
    secret = "geheim-7f3a"
    before = len(log.getvalue())
    body = ASK | {"messages": [{"role": "user", "content": secret}]}
    server[1].metrics, usual = (lambda: 1 / 0), server[1].metrics
    try:
        submit = server[1].submit

        def broken(asked):
            raise RuntimeError(asked.example.instruction)

        server[1].submit = broken
        told = refused(client.post(PATH, json=body), 500, "internal")
    finally:
        server[1].submit, server[1].metrics = submit, usual
    written = log.getvalue()[before:]
    assert secret not in told and secret not in written and "RuntimeError" in written
    assert told.rpartition(" ")[2].rstrip(")") in written


def test_errors_hold_nothing_of_other_requests(client, server):
    """The name of a file is its place in its own request."""
    engine = server[1]
    engine.fail = lambda asked: UserError("is broken", field=asked.example.media[0][1])
    try:
        told = refused(client.post(PATH, json=inline(served.picture())), 400)
    finally:
        engine.fail = lambda _: None
    assert told == "messages[0].content[0]: is broken"
    assert engine.asked[-1].example.key not in told


def test_the_log_holds_neither_words_nor_files(client, log):
    before = len(log.getvalue())
    body = inline(served.picture())
    body["messages"][0]["content"][1]["text"] = "geheim"
    assert "geheim" in client.post(PATH, json=body).text
    line = log.getvalue()[before:].splitlines()[0]
    assert "POST /v1/chat/completions" in line and "status=200" in line and "files=1" in line
    assert "geheim" not in line and "iVBOR" not in line and KEY not in log.getvalue()


NO_KEYS = ("", "# none\n", "short\n", "sk-0123456789 abcdef\n", "\xff" * 20)


@pytest.mark.parametrize("content", NO_KEYS)
def test_files_of_keys_that_are_none(tmp_path, content):
    (tmp_path / "keys").write_text(content, "latin-1")
    with pytest.raises(UserError, match="--api_key_file"):
        Keys.load(tmp_path / "keys")


def test_several_keys(tmp_path):
    (tmp_path / "keys").write_text(f"# two\n{KEY}\n\n{KEY[::-1]}\n")
    keys = Keys.load(tmp_path / "keys")
    assert keys.required and keys.allow(KEY) and keys.allow(KEY[::-1]) and keys.allow(keys.inside)
    assert not keys.allow("") and not keys.allow("# two")
    assert not Keys().required


def test_names_of_this_server():
    names = Names(frozenset(("example.org", "::1")), frozenset(("https://page.test",)))
    for headers in (
        {"host": "Example.org:8000"},
        {"host": "[::1]:8000"},
        {"host": "example.org", "origin": "https://page.test"},
        {"host": "example.org", "origin": "https://example.org"},
    ):
        names.check(headers)
