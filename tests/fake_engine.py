"""An engine without a model: it answers with what it was asked, one character a step."""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections.abc import Callable, Mapping

from xllm_jax.core.errors import UserError
from xllm_jax.serve import request
from xllm_jax.serve.request import Event, Overloaded, QueueFull, Request, Ticket, Token, Usage


class FakeEngine:
    """Answers 'ANSWER|QUESTION|modality:digest,…', greedily or with letters drawn by the seed.

    Attributes:
      pause: seconds a character takes.
      most: requests at a time; more are refused.
      running: tickets under way.
      asked: requests that came, in order.
      pictures: that its answers hold.
      text: that it answers whatever is asked; '' for what the class says.
      fail: what a request meets instead of an answer.
    """

    def __init__(self, pause: float = 0.0, most: int = 100):
        self.pause, self.most = pause, most
        self.ready, self.stopped = False, False
        self.running: set[Ticket] = set()
        self.asked: list[Request] = []
        self.cancelled = 0
        self.text = ""
        self.pictures: tuple = ()
        self.fail: Callable[[Request], Exception | None] = lambda _: None
        self._lock = threading.Lock()

    def start(self) -> None:
        self.ready = True

    def submit(self, asked: Request) -> Ticket:
        if not self.ready:
            raise Overloaded("the engine is stopping")
        with self._lock:
            if len(self.running) >= self.most:
                raise QueueFull("too many requests wait")
            self.asked.append(asked)
            ticket = Ticket(asked)
            self.running.add(ticket)
        threading.Thread(target=self._answer, args=(ticket,), daemon=True).start()
        return ticket

    def _answer(self, ticket: Ticket) -> None:
        try:
            ticket.put(self._written(ticket))
        except UserError as error:
            ticket.put(Event(finish_reason="error", error=error))
        except Exception as error:  # as a defect of an engine would be
            ticket.put(Event(finish_reason="error", error=UserError(f"defect {error!r}")))
        finally:
            with self._lock:
                self.running.discard(ticket)

    def _written(self, ticket: Ticket) -> Event:
        asked = ticket.request
        failed = self.fail(asked)
        if failed:
            raise failed
        text, how = self.text or answer(asked), asked.sampling
        cut = min((text.find(stop) for stop in how.stop if stop in text), default=-1)
        reason = "stop"
        text = text if cut < 0 else text[:cut]
        if how.max_tokens is not None and how.max_tokens < len(text):
            text, reason = text[: how.max_tokens], "length"
        usage = Usage(len(asked.example.instruction) + 5 * len(asked.example.media), len(text))
        for sign in text:
            if ticket.cancelled or self.stopped:
                self.cancelled += 1
                return Event(finish_reason="cancelled", usage=usage)
            told = () if how.logprobs is None else (_token(sign, how.logprobs),)
            ticket.put(Event(sign, told))
            if self.pause:
                time.sleep(self.pause)
        return Event(finish_reason=reason, usage=usage, pictures=self.pictures)

    def stop(self, drain_seconds: float = 30.0) -> None:
        self.ready = False
        until = time.monotonic() + drain_seconds
        while self.running and time.monotonic() < until:
            time.sleep(0.01)
        self.stopped = True
        while self.running:
            time.sleep(0.01)

    def metrics(self) -> Mapping[str, float]:
        return {"requests_total": len(self.asked), "slots_busy": len(self.running)}


def answer(asked: Request) -> str:
    """What is answered without stop texts and bounds."""
    example = asked.example
    digests = [hashlib.sha256(path.content).hexdigest()[:6] for _, path in example.media]
    files = ",".join(f"{name}:{one}" for (name, _), one in zip(example.media, digests))
    told = "".join(f"{q}>{a}/" for q, a in example.history)
    drawn = "ANSWER"
    if asked.sampling.temperature > 0:
        drawn = "".join(random.Random(asked.sampling.seed).choices("abcdefgh", k=6))
    return f"{drawn}|{told}{example.instruction}|{files}"


def _token(sign: str, count: int) -> Token:
    others = tuple(request.Alternative(n, chr(97 + n), -1.0 - n) for n in range(count))
    return Token(ord(sign), sign, -0.5, others)
