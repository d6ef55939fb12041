"""Requests a second and time to first token: our server against the same LLM behind PyTorch.

    PYTHONPATH=. python benchmarks/serve.py [--clients=1,8,32] [--rounds=3] [--output=serve.json]

A LLaMA with random weights (`serve_model.py`) is served by `xllm serve` and by transformers'
`generate` behind FastAPI (`serve_torch.py`), one request at a time and, as a third contender, in
padded batches. The answers of all to the same questions are compared first. Then the contenders are
asked in turn, round by round, by as many clients as `--clients` says; each asks its next question
when the last one is answered, streams, and wants `--tokens` tokens. All servers, and the clients,
share the same cores. Printed is the median over the rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import serve_model

ROOT = Path(__file__).parents[1]
OURS, THEIRS, BATCHED = "xllm serve", "transformers", "transformers, batches"
TICKS = os.sysconf("SC_CLK_TCK")


class Server:
    """A server on this machine.

    Args:
      name: of the contender.
      port: that it listens at.
      pid: of its process.
    """

    def __init__(self, name: str, port: int, pid: int):
        self.name, self.port, self.pid = name, port, pid

    def wait(self, path: str, seconds: float = 600.0) -> None:
        """Waits until it answers a path with anything but 503."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if not Path(f"/proc/{self.pid}").exists():
                raise SystemExit(f"{self.name} has ended")
            with contextlib.suppress(OSError):
                asked = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
                with contextlib.closing(asked):
                    asked.request("GET", path)
                    if asked.getresponse().status != 503:
                        return
            time.sleep(0.2)
        raise SystemExit(f"{self.name} is not ready after {seconds:.0f} s")

    @property
    def cpu_seconds(self) -> float:
        """CPU time that its process has taken."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


@contextlib.contextmanager
def started(name: str, command: list[str], port: int) -> Iterator[Server]:
    """A server for the block."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(
        [*command, f"--port={port}"], env=environment, stdout=subprocess.DEVNULL
    )
    server = Server(name, port, process.pid)
    try:
        server.wait("/ready" if name == OURS else "/docs")
        yield server
    finally:
        process.terminate()
        process.wait(60)


def commands(made: serve_model.Made, slots: int, tokens: int) -> dict[str, list[str]]:
    """How the contenders are started."""
    ours = [sys.executable, "-m", "xllm_jax.launch.commands", "serve", "--nopage"]
    ours += [f"--checkpoint={made.run}", f"--slots={slots}", f"--max_tokens={tokens}"]
    ours += ["--length=128", "--queue=256", "--queue_seconds=600"]
    theirs = [sys.executable, str(ROOT / "benchmarks" / "serve_torch.py")]
    theirs += [f"--model={made.published}"]
    return {OURS: ours, THEIRS: theirs, BATCHED: [*theirs, f"--batch={slots}"]}


class Client:
    """Asks one question after the other over one connection."""

    def __init__(self, server: Server):
        self.connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=600)

    def close(self) -> None:
        """Leaves."""
        self.connection.close()

    def ask(self, question: str, tokens: int) -> tuple[str, float, float]:
        """(the answer, seconds to its first piece, seconds to its end).

        Raises:
          SystemExit: the server refuses.
        """
        body = {"model": "run", "messages": [{"role": "user", "content": question}]}
        body |= {"temperature": 0, "max_tokens": tokens, "stream": True}
        began, first, text = time.perf_counter(), 0.0, ""
        content = json.dumps(body)
        head = {"Content-Type": "application/json"}
        self.connection.request("POST", "/v1/chat/completions", content, head)
        answer = self.connection.getresponse()
        if answer.status != 200:
            raise SystemExit(f"{answer.status}: {answer.read().decode()[:500]}")
        for line in answer:
            if line.startswith(b"data: {"):
                choices = json.loads(line[6:])["choices"]
                piece = choices[0]["delta"].get("content", "") if choices else ""
                first = first or (time.perf_counter() - began if piece else 0.0)
                text += piece
        return text, first, time.perf_counter() - began


def load(server: Server, questions: list[str], clients: int, tokens: int) -> dict[str, float]:
    """What so many clients see who ask all questions together."""
    waiting, firsts, wholes = list(reversed(questions)), [], []
    lock, failed = threading.Lock(), []

    def run() -> None:
        try:
            with contextlib.closing(Client(server)) as client:
                while question := taken():
                    _, first, whole = client.ask(question, tokens)
                    firsts.append(first)
                    wholes.append(whole)
        except BaseException as error:
            failed.append(error)

    def taken() -> str:
        with lock:
            return waiting.pop() if waiting else ""

    before, began = server.cpu_seconds, time.perf_counter()
    threads = [threading.Thread(target=run) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    if failed:
        raise failed[0]
    return {
        "requests_per_second": len(questions) / seconds,
        "requests_per_cpu_second": len(questions) / max(server.cpu_seconds - before, 1e-9),
        "first_token_median": statistics.median(firsts),
        "first_token_worst": max(firsts),
        "whole_median": statistics.median(wholes),
    }


def compare(servers: list[Server], questions: list[str], tokens: int) -> None:
    """Ends where a contender gives another answer than the first one."""
    said: dict[str, list[str]] = {}
    for one in servers:
        with contextlib.closing(Client(one)) as client:
            said[one.name] = [client.ask(question, tokens)[0] for question in questions]
    wanted = said[servers[0].name]
    if not all(wanted) or len(set(wanted)) < 2:
        raise SystemExit("the answers say nothing")
    for name, found in said.items():
        if found != wanted:
            odd = next(n for n, pair in enumerate(zip(found, wanted)) if pair[0] != pair[1])
            raise SystemExit(f"{name}: {found[odd]!r} instead of {wanted[odd]!r}")


def measure(
    servers: list[Server], levels: list[int], rounds: int, requests: int, tokens: int
) -> list[dict[str, Any]]:
    """The medians of all contenders at all numbers of clients."""
    found: dict[tuple[int, str], list[dict[str, float]]] = {}
    for number in range(rounds):
        for clients in levels:
            questions = serve_model.questions(max(requests, clients))
            for server in servers if number % 2 == 0 else reversed(servers):
                row = load(server, questions, clients, tokens)
                found.setdefault((clients, server.name), []).append(row)
    return [
        {"clients": clients, "server": name}
        | {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        for (clients, name), rows in found.items()
    ]


def run(
    sizes: serve_model.Sizes,
    levels: list[int],
    rounds: int,
    requests: int,
    tokens: int,
    slots: int,
    batched: bool = True,
) -> dict[str, Any]:
    """Makes the LLM, starts the contenders, compares, measures."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        made = serve_model.make(Path(folder), sizes)
        wanted = commands(made, slots, tokens)
        names = [OURS, THEIRS, *([BATCHED] if batched else [])]
        servers = [stack.enter_context(started(name, wanted[name], free_port())) for name in names]
        compare(servers, serve_model.questions(12), tokens)
        rows = measure(servers, levels, rounds, requests, tokens)
    about = {"parameters": made.parameters, "tokens": tokens, "slots": slots, "requests": requests}
    return about | {"cores": len(os.sched_getaffinity(0)), "rounds": rounds, "rows": rows}


def table(found: dict[str, Any]) -> str:
    """The results as Markdown."""
    names = {name: row for row in found["rows"] for name in [(row["clients"], row["server"])]}
    head = "| clients | server | requests/s | per CPU second | first token, median (worst) | x |"
    lines = [head, "| --- | --- | --- | --- | --- | --- |"]
    for (clients, name), row in names.items():
        base = names.get((clients, THEIRS), row)
        lines.append(
            f"| {clients} | {name} | {row['requests_per_second']:.2f} "
            f"| {row['requests_per_cpu_second']:.2f} "
            f"| {row['first_token_median']:.3f} s ({row['first_token_worst']:.2f}) "
            f"| {row['requests_per_second'] / base['requests_per_second']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Prints the table; writes all numbers to --output."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--clients", default="1,8,32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--output", type=Path)
    flags = parser.parse_args()
    width = flags.width
    sizes = serve_model.Sizes(width=width, depth=flags.depth, hidden=width * 8 // 3)
    levels = [int(text) for text in flags.clients.split(",")]
    found = run(sizes, levels, flags.rounds, flags.requests, flags.tokens, flags.slots)
    if flags.output:
        flags.output.write_text(json.dumps(found, indent=1))
    print(f"{found['parameters'] / 1e6:.1f} million parameters, {found['cores']} cores")
    print(table(found))


if __name__ == "__main__":
    main()
