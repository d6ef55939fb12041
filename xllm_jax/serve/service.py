"""All that the routes of the server share, and how a request waits for its answers."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import ParamSpec, TypeVar

from starlette.requests import Request as Incoming

from xllm_jax.data.example import Example
from xllm_jax.inference.replies import Picture
from xllm_jax.serve import errors, request
from xllm_jax.serve.easel import Easel
from xllm_jax.serve.errors import ApiError
from xllm_jax.serve.gate import Asked
from xllm_jax.serve.hearing import Ears
from xllm_jax.serve.limits import Limits
from xllm_jax.serve.media_input import MediaReader, Medium, Part
from xllm_jax.serve.metrics import Metrics
from xllm_jax.serve.request import Answer, Engine, Event, Request, Sampling, Ticket

P = ParamSpec("P")
T = TypeVar("T")

Finish = Callable[[Event, Sampling], Awaitable[Event]]
"""What is made of an event before a client sees it."""


@dataclasses.dataclass(frozen=True)
class Card:
    """What the server says of its model.

    Attributes:
      name: that clients ask for.
      modalities: of the files that it reads.
      created: seconds since 1970.
      max_tokens: of an answer, whatever a request asks for.
    """

    name: str
    modalities: tuple[str, ...]
    created: int = 0
    max_tokens: int = 256


@dataclasses.dataclass
class Service:
    """A model that is served.

    Attributes:
      engine: answers requests.
      card: of the model.
      limits: of requests.
      media: takes files.
      metrics: count.
      easel: draws pictures; None where answers hold text alone.
      ears: hear speech, with times; None where the model hears none.
      log_text: also write questions and answers to the log.
      draining: whether the server is about to end.
      turn: of work on the device beside the engine's.
    """

    engine: Engine
    card: Card
    limits: Limits
    media: MediaReader
    metrics: Metrics
    easel: Easel | None = None
    ears: Ears | None = None
    log_text: bool = False
    draining: bool = False
    turn: asyncio.Lock = dataclasses.field(default_factory=asyncio.Lock)

    @property
    def ready(self) -> bool:
        """Whether it takes requests."""
        return self.engine.ready and not self.draining

    def check_ready(self) -> None:
        """Raises ApiError where it takes no requests."""
        if not self.ready:
            what = "The server is stopping" if self.draining else "The server is starting"
            raise ApiError(503, what, "server_error", "unavailable")

    async def files(self, parts: Sequence[Part], asked: Asked) -> list[Medium]:
        """The files of a request; errors as of `MediaReader`."""
        found = await asyncio.to_thread(self.media, parts, asked.id)
        for modality, _ in found:
            self.metrics.medium(modality)
        return found

    def submit(self, asked: Asked, example: Example, samplings: Sequence[Sampling]) -> list[Ticket]:
        """Asks the engine once for each sampling; if one is refused, none is answered.

        Raises:
          ApiError: the engine refuses.
        """
        tickets: list[Ticket] = []
        try:
            for number, sampling in enumerate(samplings):
                one = Request(f"{asked.id}-{number}", example, sampling)
                tickets.append(self.engine.submit(one))
        except request.UserError as error:
            cancel(tickets)
            raise errors.of(error) from None
        except BaseException:
            cancel(tickets)
            raise
        return tickets

    async def draw(self, orders: Sequence[tuple[Picture, int, tuple[int, int]]]) -> list[bytes]:
        """PNG files; who leaves before takes them back.

        Args:
          orders: (picture, seed, (height, width)) of each.

        Raises:
          ApiError: too many wait, or drawing fails.
        """
        assert self.easel is not None
        futures: list[asyncio.Future[bytes]] = []
        try:
            for picture, seed, size in orders:
                drawn = self.easel.draw(picture, seed % 2**32, size)
                futures.append(asyncio.wrap_future(drawn))
            return list(await asyncio.gather(*futures))
        except request.UserError as error:
            raise errors.of(error) from None
        finally:
            for future in futures:
                future.cancel()

    async def drawn(self, event: Event, sampling: Sampling) -> Event:
        """An event with PNG files in the place of its pictures, drawn with the answer's seed.

        Those without a decoder are left out; errors as of `draw`.
        """
        easel = self.easel
        known = [one for one in event.pictures if easel and one.modality in easel.sizes]
        if easel is None or not known:
            return dataclasses.replace(event, pictures=())
        orders = [
            (one, sampling.seed + number, easel.size(None, one.modality))
            for number, one in enumerate(known)
        ]
        return dataclasses.replace(event, pictures=tuple(await self.draw(orders)))

    def tell(self, asked: Asked, question: str, answers: Sequence[str]) -> None:
        """Adds question and answers to the request's line in the log, if that is wanted."""
        if self.log_text:
            asked.notes |= {"question": ascii(question), "answers": ascii(list(answers))}


async def in_turn(served: Service, work: Callable[P, T], *given: P.args, **named: P.kwargs) -> T:
    """What some work in a thread gives that the device does one at a time beside the engine's."""
    async with served.turn:
        return await asyncio.to_thread(work, *given, **named)


def cancel(tickets: Sequence[Ticket]) -> None:
    """Gives the slots of some requests back."""
    for ticket in tickets:
        ticket.cancel()


def checked(event: Event) -> Event:
    """The event.

    Raises:
      ApiError: it says that there will be no answer.
    """
    if event.finish_reason == "error" and event.error is not None:
        raise errors.of(event.error)
    if event.finish_reason == "cancelled":
        raise ApiError(503, "The server is stopping", "server_error", "cancelled")
    return event


async def events(
    tickets: Sequence[Ticket], finish: Finish | None = None
) -> AsyncGenerator[tuple[int, Event], None]:
    """(number of the answer, event) of several answers as they come; one that leaves cancels all.

    Args:
      tickets: of the answers.
      finish: is asked about every event; others do not wait for it.

    Raises:
      ApiError: one of them cannot be answered.
    """
    queue: asyncio.Queue[tuple[int, Event | BaseException]] = asyncio.Queue()

    async def follow(number: int, ticket: Ticket) -> None:
        try:
            async for event in ticket:
                done = await finish(event, ticket.request.sampling) if finish else event
                queue.put_nowait((number, done))
        except Exception as error:
            queue.put_nowait((number, error))

    tasks = [asyncio.create_task(follow(*pair)) for pair in enumerate(tickets)]
    left = len(tickets)
    try:
        while left:
            number, event = await queue.get()
            if isinstance(event, BaseException):
                raise event
            yield number, checked(event)
            left -= event.finish_reason is not None
    finally:
        for task in tasks:
            task.cancel()
        cancel(tickets)


async def answers(tickets: Sequence[Ticket], finish: Finish | None = None) -> list[Answer]:
    """The whole answers of some tickets; arguments as of `events`.

    Raises:
      ApiError: one of them cannot be answered.
    """
    found: list[list[Event]] = [[] for _ in tickets]
    async for number, event in events(tickets, finish):
        found[number].append(event)
    return [request.joined(one) for one in found]


async def unless_gone(incoming: Incoming, work: Awaitable[T]) -> T:
    """What some work gives; where the client leaves before, the work is broken off.

    Raises:
      ApiError: the client has left; nobody reads it.
    """

    async def gone() -> None:
        while (await incoming.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.create_task(gone())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ApiError(499, "The client has left", code="cancelled")
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)
