"""What engine and server share: events reach threads and event loops, and a cancel is told once."""

from __future__ import annotations

import asyncio
import threading

import pytest

from xllm_jax.core.errors import UserError
from xllm_jax.data.example import Example
from xllm_jax.serve.request import Event, Request, Sampling, Ticket, TimedOut, Usage

ASKED = Request("one", Example("one", (), "?"))
EVENTS = [Event("a"), Event("b"), Event("", finish_reason="stop", usage=Usage(3, 2))]


def put_slowly(ticket: Ticket) -> threading.Thread:
    """Another thread puts the events, each after a moment."""

    def work() -> None:
        for event in EVENTS:
            threading.Event().wait(0.01)
            ticket.put(event)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_a_thread_reads_the_events():
    ticket = Ticket(ASKED)
    thread = put_slowly(ticket)
    assert list(ticket) == EVENTS
    thread.join()
    again = Ticket(ASKED)
    thread = put_slowly(again)
    answer = again.result(timeout=10)
    thread.join()
    assert (answer.text, answer.finish_reason, answer.usage) == ("ab", "stop", Usage(3, 2))


def test_an_event_loop_reads_the_events_and_runs_on():
    ticket, ticks = Ticket(ASKED), []

    async def tick() -> None:
        while True:
            ticks.append(1)
            await asyncio.sleep(0.002)

    async def read() -> list[Event]:
        other = asyncio.create_task(tick())
        found = [event async for event in ticket]
        other.cancel()
        return found

    thread = put_slowly(ticket)
    assert asyncio.run(read()) == EVENTS
    assert len(ticks) > 2
    thread.join()


def test_a_reader_that_leaves_cancels_once():
    calls = []
    ticket = Ticket(ASKED, lambda: calls.append(1))

    async def read_one() -> None:
        events = aiter(ticket)
        async for _ in events:
            break
        await events.aclose()

    ticket.put(EVENTS[0])
    asyncio.run(read_one())
    ticket.cancel()
    assert ticket.cancelled and calls == [1]


def test_an_answer_that_is_over_cannot_be_cancelled_or_added_to():
    calls = []
    ticket = Ticket(ASKED, lambda: calls.append(1))
    for event in (*EVENTS, Event("late")):
        ticket.put(event)
    ticket.cancel()
    assert list(ticket) == EVENTS and calls == []


def test_errors_and_late_events_are_raised():
    ticket = Ticket(ASKED)
    with pytest.raises(TimeoutError):
        ticket.get(timeout=0.01)
    ticket.put(Event(finish_reason="error", error=TimedOut("waited too long")))
    with pytest.raises(TimedOut, match="waited") as caught:
        ticket.result()
    assert caught.value.status == 503


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", float("nan")),
        ("top_k", -1),
        ("seed", 2**64),
        ("max_tokens", 0),
        ("stop", ("",)),
        ("stop", ("a",) * 17),
        ("logprobs", 21),
    ],
)
def test_wrong_sampling_names_its_field(field, value):
    with pytest.raises(UserError, match=field):
        Sampling(**{field: value})
