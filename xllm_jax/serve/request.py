"""What a client asks of a served model, and what comes back: types that engine and server share.

An engine answers `Request`s. Whoever submits one holds a `Ticket` and reads `Event`s from it, from
a thread (`for event in ticket`) or in an event loop (`async for event in ticket`); the last one has
a `finish_reason`.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import math
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any, ClassVar, Literal, Protocol

from xllm_jax.core.errors import UserError
from xllm_jax.data.example import Example

FinishReason = Literal["stop", "length", "cancelled", "error"]

MOST_STOPS = 16
MOST_ALTERNATIVES = 20  # alternatives that are told of each token, as in OpenAI's interface


class Refused(UserError):
    """A request that a healthy server does not answer now; the same one may be answered later.

    Attributes:
      status: of HTTP.
    """

    status: ClassVar[int] = 503


class QueueFull(Refused):
    """As many requests wait already as may wait."""

    status = 429


class Overloaded(Refused):
    """The engine does not take requests: it is starting or stopping."""


class TimedOut(Refused):
    """A request waited, or ran, for longer than it may."""


class Defect(Refused):
    """The engine failed, by a fault of ours or of its device; its log has the traceback."""

    status = 500


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How one answer is to be decoded.

    Attributes:
      temperature: divides the scores; 0 takes the best token (greedy).
      top_p: share of probability that the drawn tokens have; 1 = all.
      top_k: number of best tokens that may be drawn; 0 = all.
      seed: of the drawing; the same request with the same seed has the same answer.
      max_tokens: tokens of the answer, the end token included; None = as many as the engine allows.
      stop: texts before which the answer ends.
      logprobs: number of best alternatives to tell of each token; None = no log-probabilities.

    Raises:
      UserError: a value that makes no sense; names the field.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        _check(
            math.isfinite(self.temperature) and self.temperature >= 0, "temperature", "0 or more"
        )
        _check(0 < self.top_p <= 1, "top_p", "above 0, at most 1")
        _check(self.top_k >= 0, "top_k", "0 or more")
        _check(-(2**63) <= self.seed < 2**64, "seed", "a number of 64 bits")
        _check(self.max_tokens is None or self.max_tokens > 0, "max_tokens", "1 or more")
        _check(len(self.stop) <= MOST_STOPS, "stop", f"at most {MOST_STOPS} texts")
        _check(all(self.stop), "stop", "texts that are not empty")
        most = MOST_ALTERNATIVES
        told = self.logprobs is None or 0 <= self.logprobs <= most
        _check(told, "logprobs", f"0 to {most}")


def _check(right: bool, field: str, allowed: str) -> None:
    if not right:
        raise UserError("is not what it may be", field=field, hint=f"Allowed: {allowed}")


@dataclasses.dataclass(frozen=True)
class Request:
    """One question.

    Attributes:
      key: unique name, for logs.
      example: files (local paths, which must stay until the answer ends), question and history; its
        answer is not looked at.
      sampling: how to decode.
    """

    key: str
    example: Example
    sampling: Sampling = dataclasses.field(default_factory=Sampling)


@dataclasses.dataclass(frozen=True)
class Alternative:
    """A token that might have stood somewhere.

    Attributes:
      token: its id.
      text: it alone; bytes of a character that several tokens make are no text yet, and are ''.
      logprob: natural logarithm of its probability under the LLM, before temperature and filters.
    """

    token: int
    text: str
    logprob: float


@dataclasses.dataclass(frozen=True)
class Token(Alternative):
    """A token of the answer, with the best alternatives in its place, itself mostly among them."""

    top: tuple[Alternative, ...] = ()


@dataclasses.dataclass(frozen=True)
class Usage:
    """Tokens that a request took: of the prompt, media included, and of the answer."""

    prompt_tokens: int
    completion_tokens: int


@dataclasses.dataclass(frozen=True)
class Event:
    """A piece of an answer.

    Attributes:
      text: what follows the text so far: whole characters, never a part of a stop text.
      tokens: those decoded since the event before. Their texts need not add up to `text`, which may
        lag behind while a character or a stop text is open.
      finish_reason: None while more follows. 'stop': the LLM or a stop text ended it; 'length':
        max_tokens did; 'cancelled'; 'error'.
      usage: with the last event.
      error: with the finish_reason 'error': a `UserError` of the request, or a `Refused`.
      pictures: what the answer holds beside text, with the last event: `Picture`s of an engine, and
        PNG files where a server has drawn them.
    """

    text: str = ""
    tokens: tuple[Token, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    error: UserError | None = None
    pictures: tuple[Any, ...] = ()


@dataclasses.dataclass(frozen=True)
class Answer:
    """A whole answer; the fields are those of `Event`."""

    text: str
    tokens: tuple[Token, ...]
    finish_reason: FinishReason
    usage: Usage | None
    pictures: tuple[Any, ...] = ()


class Ticket:
    """The answer to one request while it comes; for one reader at a time.

    Args:
      request: it.
      on_cancel: is called once, from the thread that cancels.
    """

    def __init__(self, request: Request, on_cancel: Callable[[], None] = lambda: None):
        self.request = request
        self._on_cancel = on_cancel
        self._events: collections.deque[Event] = collections.deque()
        self._changed = threading.Condition()
        self._wake: Callable[[], None] | None = None
        self._cancelled = self._over = False

    @property
    def cancelled(self) -> bool:
        """Whether nobody wants the answer any more."""
        return self._cancelled

    def cancel(self) -> None:
        """Ends the request, which gives its slot back; a last event tells it. Harmless if over."""
        with self._changed:
            first, self._cancelled = not self._cancelled and not self._over, True
        if first:
            self._on_cancel()

    def put(self, event: Event) -> None:
        """Adds an event; for engines. What comes after the last event is dropped."""
        with self._changed:
            if self._over:
                return
            self._events.append(event)
            self._over = event.finish_reason is not None
            wake = self._wake
            self._changed.notify_all()
        if wake:
            wake()

    def get(self, timeout: float | None = None) -> Event:
        """The next event, for threads.

        Args:
          timeout: seconds to wait; None waits for ever.

        Raises:
          TimeoutError: none came.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: bool(self._events), timeout):
                raise TimeoutError(f"no event within {timeout} s")
            return self._events.popleft()

    def __iter__(self) -> Iterator[Event]:
        return self.events()

    def events(self, timeout: float | None = None) -> Iterator[Event]:
        """All events, the last one included; waits `timeout` seconds for each, see `get`."""
        while True:
            event = self.get(timeout)
            yield event
            if event.finish_reason is not None:
                return

    async def __aiter__(self) -> AsyncIterator[Event]:
        """All events in an event loop, which is never blocked; a reader that leaves cancels."""
        loop, fresh = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads on
                loop.call_soon_threadsafe(fresh.set)

        with self._changed:
            self._wake = wake
        last = False
        try:
            while not last:
                with self._changed:
                    fresh.clear()
                    event = self._events.popleft() if self._events else None
                if event is None:
                    await fresh.wait()
                    continue
                last = event.finish_reason is not None
                yield event
        finally:
            with self._changed:
                self._wake = None
            if not last:
                self.cancel()

    def result(self, timeout: float | None = None) -> Answer:
        """Waits for the whole answer, `timeout` seconds for each event, see `get`.

        Raises:
          UserError: the request could not be answered, see `Event.error`.
        """
        events = list(self.events(timeout))
        return joined(events)


def joined(events: list[Event]) -> Answer:
    """The answer that some events are.

    Args:
      events: all of one ticket.

    Raises:
      UserError: the request could not be answered, see `Event.error`.
    """
    last = events[-1]
    if last.error is not None:
        raise last.error
    assert last.finish_reason is not None, "all events of a ticket"
    tokens = tuple(token for event in events for token in event.tokens)
    pictures = tuple(picture for event in events for picture in event.pictures)
    text = "".join(event.text for event in events)
    return Answer(text, tokens, last.finish_reason, last.usage, pictures)


class Engine(Protocol):
    """What answers requests. Its methods may be called from any thread."""

    @property
    def ready(self) -> bool:
        """Whether it is warmed up and takes requests."""
        ...

    def start(self) -> None:
        """Warms up: compiles all that will run, which may take minutes, then takes requests."""
        ...

    def submit(self, request: Request) -> Ticket:
        """Queues a request; returns at once. What is wrong with its files comes as an event.

        Raises:
          UserError: the request can never be answered.
          QueueFull: too many wait.
          Overloaded: not ready, or stopping.
        """
        ...

    def stop(self, drain_seconds: float = 30.0) -> None:
        """Takes no more requests, lets those it has finish, cancels what is left after the time.

        Returns when nothing runs any more. A second call may shorten the time of the first.
        """
        ...

    def metrics(self) -> Mapping[str, float]:
        """Counters (`..._total`), gauges and sums now, by names fit for Prometheus; all numbers.

        `requests_total`, `requests_failed_total`, `requests_cancelled_total`,
        `requests_refused_total`, `queue_length`, `queue_seconds_total`, `request_seconds_total`,
        `slots`, `slots_busy`, `steps_total`, `prompt_tokens_total`, `completion_tokens_total`,
        `compilations_since_warm_up_total`, `media_cache_bytes`, `media_cache_hits_total`,
        `media_cache_misses_total`.
        """
        ...
