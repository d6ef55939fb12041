"""A soak of the server: ten thousand mixed requests, and what must be as it was before.

    PYTHONPATH=. python benchmarks/serve_soak.py --checkpoint=demo/runs/stage3 --world=demo/world

`xllm serve` is started with small limits. First every valid request is asked alone, and so is
every broken and every oversized one (`soak_requests.py`). Then many clients ask a mixture of them,
and a part leaves before the answer has ended. Afterwards

    every answer, and every refusal, is the one that the request gets alone;
    what clients that left had read is the beginning of that answer;
    memory is flat: resident and swapped bytes of the server and of its decoders;
    nothing was compiled, no slot is lost (one request for as many answers takes all of them), and
    nothing waits.

The command ends with 1 where one of these does not hold.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import http.client
import json
import re
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import serve
import soak_requests
from soak_requests import Asked

FLAT = 0.03  # growth of the memory that is allowed
WARM = 0.1  # share of the requests that is warm-up
SAMPLES = 100  # of the memory
PAUSE = 0.02  # seconds, times a number, before a client leaves that waits for no piece
LATER = ("id", "created")  # fields of an answer that are new every time


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a client has seen.

    Attributes:
      status: of HTTP; 0 where the server closed the connection while the body was being sent.
      text: the answer, or the error, without what is new every time.
      whole: whether the client waited for the end.
    """

    status: int
    text: str
    whole: bool = True

    def fits(self, alone: Outcome) -> bool:
        """Whether it is, or begins, what the request gets alone."""
        if not self.status:  # nobody read the refusal of a body that is too large
            return alone.status == 413
        if not self.whole:
            return self.status == alone.status and alone.text.startswith(self.text)
        return (self.status, self.text) == (alone.status, alone.text)


def ask(port: int, asked: Asked, leave: int | None = None) -> Outcome:
    """Asks once over a connection of its own.

    Args:
      port: of the server.
      asked: what.
      leave: pieces after which the client leaves; None waits.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    with contextlib.closing(connection):
        body: Any = iter([asked.body[:1000], asked.body[1000:]]) if asked.chunked else asked.body
        sent = True
        try:
            connection.request(
                asked.method, asked.path, body, dict(asked.headers), encode_chunked=asked.chunked
            )
        except (BrokenPipeError, ConnectionResetError):
            sent = False
        if leave is not None and (leave == 0 or not asked.stream):
            time.sleep(leave * PAUSE)
            return Outcome(200, "", False)
        try:
            answer = connection.getresponse()
            return read(answer, asked, leave)
        except (ConnectionResetError, BrokenPipeError, http.client.RemoteDisconnected):
            if sent and len(asked.body) < soak_requests.BODY:
                raise
            return Outcome(0, "")


def read(answer: http.client.HTTPResponse, asked: Asked, leave: int | None) -> Outcome:
    """What the server says."""
    if answer.status != 200 or not asked.stream:
        return bare(answer)
    text, reason, pieces = "", "", 0
    for line in answer:
        if not line.startswith(b"data: {"):
            continue
        told = json.loads(line[6:])
        if "error" in told:
            return Outcome(answer.status, json.dumps(told, sort_keys=True))
        text += told["choices"][0]["delta"].get("content", "")
        reason = told["choices"][0]["finish_reason"] or reason
        pieces += 1
        if pieces == leave:
            return Outcome(answer.status, text, False)
    return Outcome(answer.status, f"{text}|{reason}")


def bare(answer: http.client.HTTPResponse) -> Outcome:
    """A whole answer without its name and its time."""
    text = answer.read().decode()
    with contextlib.suppress(ValueError):
        told = json.loads(text)
        if isinstance(told, dict):
            told = {name: value for name, value in told.items() if name not in LATER}
        text = json.dumps(told, sort_keys=True, ensure_ascii=False)
    return Outcome(answer.status, text)


def metrics(port: int) -> dict[str, float]:
    """The server's numbers without labels."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    return {name: float(value) for name, value in re.findall(r"^(\w+) ([\d.e+]+)$", text, re.M)}


def memory(process: int) -> float:
    """Bytes of a process and of all below it, resident or swapped out."""
    found = 0.0
    with contextlib.suppress(OSError):  # it has just ended
        status = Path(f"/proc/{process}/status").read_text()
        found += 1024 * sum(map(int, re.findall(r"^Vm(?:RSS|Swap):\s+(\d+)", status, re.M)))
        for file in Path(f"/proc/{process}/task").glob("*/children"):
            found += sum(memory(int(child)) for child in file.read_text().split())
    return found


def mix(
    port: int, tasks: Iterable[tuple[Asked, int | None]], clients: int, seen: Callable[[], None]
) -> list[tuple[Asked, Outcome]]:
    """What many clients see; `seen` is called behind each request.

    Raises:
      Exception: what a client met that is no outcome.
    """
    given, lock = iter(tasks), threading.Lock()
    found: list[tuple[Asked, Outcome]] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            while not failed:
                with lock:
                    task = next(given, None)
                if task is None:
                    return
                outcome = ask(port, *task)
                with lock:
                    found.append((task[0], outcome))
                    seen()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return found


def slots_at_once(port: int, slots: int) -> int:
    """The most slots that are busy while one request asks for as many answers."""
    most = 0
    long = soak_requests.chat(
        "text", soak_requests.words("请描述这张图。"), n=slots, max_tokens=64, temperature=2.0
    )
    for _ in range(20):
        thread = threading.Thread(target=ask, args=(port, long))
        thread.start()
        while thread.is_alive():
            most = max(most, int(metrics(port).get("xllm_slots_busy", 0)))
        if most == slots:
            break
    return most


def idle(port: int, seconds: float = 60.0) -> bool:
    """Whether nothing runs or waits any more, at the latest after some seconds."""
    until = time.monotonic() + seconds
    names = ("xllm_slots_busy", "xllm_queue_length")
    while time.monotonic() < until:
        now = metrics(port)
        if not any(now.get(name, 0) for name in names):
            return True
        time.sleep(0.05)
    return False


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much is asked."""

    requests: int = 10_000
    clients: int = 12
    different: int = 200
    slots: int = 8


def soak(port: int, process: int, given: soak_requests.Files, plan: Plan) -> dict[str, Any]:
    """Asks alone, then all at once; returns what was found."""
    before = metrics(port)
    good = soak_requests.valid(given, plan.different)
    bad, huge = soak_requests.broken(given), soak_requests.large(given)
    alone = {one.name: ask(port, one) for one in (*good, *bad, *huge)}
    tasks = list(soak_requests.mixed(good, bad, huge, plan.requests))
    sizes: list[float] = []
    count, every = 0, max(1, plan.requests // SAMPLES)

    def seen() -> None:
        nonlocal count
        count += 1
        if count % every == 0:
            sizes.append(memory(process))

    began = time.monotonic()
    found = mix(port, tasks, plan.clients, seen)
    seconds = time.monotonic() - began
    empty, after = idle(port), metrics(port)
    wrong = [(one.name, outcome, alone[one.name]) for one, outcome in found
             if not outcome.fits(alone[one.name])]  # fmt: skip
    kinds = collections.Counter(one.kind if outcome.whole else "left" for one, outcome in found)
    statuses = collections.Counter(outcome.status for _, outcome in found if outcome.whole)
    return {
        "requests": len(found),
        "seconds": round(seconds, 1),
        "kinds": dict(kinds),
        "statuses": {str(status): number for status, number in sorted(statuses.items())},
        "alone": check_alone(good, [*bad, *huge], alone),
        "different answers": len({alone[one.name].text for one in good}),
        "wrong": len(wrong),
        "examples": [str(one) for one in wrong[:5]],
        "memory": flatness(sizes),
        "compiled": _more(before, after, "xllm_compilations_since_warm_up_total"),
        "cancelled": _more(before, after, "xllm_requests_cancelled_total"),
        "idle": empty,
        "slots at once": slots_at_once(port, plan.slots) if "xllm_slots" in after else plan.slots,
    }


def check_alone(
    good: Sequence[Asked], refused: Sequence[Asked], alone: dict[str, Outcome]
) -> list[str]:
    """Requests that get something else than they are made for."""
    odd = [one.name for one in good if alone[one.name].status != 200]
    said = {one.name: alone[one.name] for one in refused}
    return odd + [
        f"{name}: {told.status}"
        for name, told in said.items()
        if told.status >= 500 or (told.status == 200 and "error" not in told.text)
    ]


def _more(before: dict[str, float], after: dict[str, float], name: str) -> int:
    return int(after.get(name, 0) - before.get(name, 0))


def flatness(sizes: Sequence[float]) -> dict[str, float]:
    """Megabytes behind the warm-up and at the end, and by which share they and the peak grew."""
    later = sizes[int(len(sizes) * WARM) :]
    part = max(1, len(later) // 10)
    first, last = (statistics.median(rows) for rows in (later[:part], later[-part:]))
    return {
        "first MB": round(first / 1e6, 1),
        "last MB": round(last / 1e6, 1),
        "growth": round(last / first - 1, 4),
        "peak": round(max(later) / first - 1, 4),
    }


def holds(found: dict[str, Any], slots: int) -> bool:
    """Whether all is as it must be."""
    return (
        not (found["alone"] or found["wrong"] or found["compiled"])
        and found["idle"]
        and found["slots at once"] == slots
        and found["memory"]["growth"] <= FLAT
    )


def main() -> None:
    """Prints what was found; exits with 1 where something does not hold."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--world", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=Plan.requests)
    parser.add_argument("--clients", type=int, default=Plan.clients)
    parser.add_argument("--slots", type=int, default=Plan.slots)
    parser.add_argument("--output", type=Path)
    flags = parser.parse_args()
    given = soak_requests.files(flags.world, 40)
    command = [sys.executable, "-m", "xllm_jax.launch.commands", "serve", "--nopage"]
    command += [f"--checkpoint={flags.checkpoint}", f"--slots={flags.slots}", "--max_tokens=64"]
    command += soak_requests.LIMITS
    plan = Plan(flags.requests, flags.clients, slots=flags.slots)
    with serve.started(serve.OURS, command, serve.free_port()) as server:
        found = soak(server.port, server.pid, given, plan)
    print(json.dumps(found, indent=1, ensure_ascii=False))
    if flags.output:
        flags.output.write_text(json.dumps(found, indent=1, ensure_ascii=False))
    if not holds(found, plan.slots):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
