"""The engine: an answer is the one that a request gets alone, and bounds hold."""

from __future__ import annotations

import collections
import dataclasses
import queue
import threading
import time

import jax
import numpy as np
import pytest
import small_engine
from jax.sharding import NamedSharding, PartitionSpec

from xllm_jax.core import mesh
from xllm_jax.core.errors import UserError
from xllm_jax.data.example import Example
from xllm_jax.data.media import modalities
from xllm_jax.inference import file_encoder
from xllm_jax.inference.assistant import Assistant
from xllm_jax.serve.request import (
    Answer,
    Defect,
    Overloaded,
    QueueFull,
    Request,
    Sampling,
    TimedOut,
)

LONG = Request("long", Example("long", (), "图中有什么？"), Sampling(3.0, seed=1))


@pytest.fixture(scope="module")
def restored():
    return small_engine.restored()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return small_engine.series(tmp_path_factory.mktemp("series"))


@pytest.fixture(scope="module")
def engine(restored):
    """One engine for all tests, since starting compiles."""
    made = small_engine.engine(restored)
    with pytest.raises(Overloaded):
        made.submit(LONG)
    made.start()
    yield made
    made.stop(0.0)


@pytest.fixture(scope="module")
def asked(files, tmp_path_factory):
    """Sixty requests that can be answered, and some that cannot."""
    broken = tmp_path_factory.mktemp("broken") / "broken.npy"
    broken.write_bytes(b"no series")
    wrong = [("sensor", str(broken)), ("sensor", str(broken) + ".gone")]
    made = small_engine.requests(files, 60)
    return made + [Request(path, Example("", (("sensor", path),), "?")) for _, path in wrong]


@pytest.fixture(scope="module")
def solo(engine, asked):
    return small_engine.alone(engine, asked)


def idle(engine) -> None:
    """Waits until nothing waits or runs."""
    wait_for(lambda: not (engine.metrics()["slots_busy"] or engine.metrics()["queue_length"]))


def test_requests_differ_and_end_in_every_way(solo, asked):
    answers = [one for one in solo.values() if isinstance(one, Answer)]
    assert len({one.text for one in answers}) > 20
    assert {"stop", "length"} == {one.finish_reason for one in answers}
    assert len(answers) > 40 and all(isinstance(solo[one.key], str) for one in asked[60:])


def test_an_answer_is_the_one_alone_whatever_else_runs(engine, asked, solo):
    """Texts, tokens, log-probabilities and usage of 500 mixes, to the last bit; some cancelled."""
    rng, count = np.random.default_rng(1), 0
    for _ in range(500):
        mix = [asked[number] for number in rng.integers(0, len(asked), int(rng.integers(2, 6)))]
        tickets = []
        for one in mix:
            tickets.append(engine.submit(one))
            if rng.random() < 0.3:  # the next one joins while this one runs
                time.sleep(0.001)
        for one, ticket in zip(mix, tickets):
            if rng.random() < 0.1:
                ticket.cancel()
            found = small_engine.outcome(ticket)
            if isinstance(found, Answer) and found.finish_reason == "cancelled":
                assert isinstance(solo[one.key], str) or solo[one.key].text.startswith(found.text)
            else:
                assert found == solo[one.key], one
        count += len(mix)
    idle(engine)
    metrics = engine.metrics()
    assert count > 1000 and metrics["requests_cancelled_total"] > 20
    assert metrics["compilations_since_warm_up_total"] == 0
    assert metrics["media_cache_bytes"] <= small_engine.OPTIONS.cache_bytes


def test_a_compilation_is_counted(engine):
    before = engine.metrics()["compilations_since_warm_up_total"]
    jax.jit(lambda x: x * 3 + before)(np.ones(7, np.float32)).block_until_ready()
    assert engine.metrics()["compilations_since_warm_up_total"] == before + 1


def test_greedy_answers_are_those_of_the_assistant(restored, engine, files):
    """`decoding.generate` is another program: one loop, another cache, the prompt in a batch."""
    model = Assistant(restored, rows=1, max_tokens=small_engine.OPTIONS.max_tokens)
    examples = [
        Example("a", (), "图中有什么？"),
        Example("b", (("sensor", files[0]),), "有几个方块"),
        Example("c", (("sensor", files[1]),), "是"),
        Example("d", (), "红色的圆在哪里？"),
    ]
    wanted = [model.answers([one])[0] for one in examples]
    tickets = [engine.submit(Request(one.key, one)) for one in examples]
    assert [ticket.result(60).text for ticket in tickets] == wanted
    assert len(set(wanted)) == 4


def test_events_are_the_answer_piece_by_piece(engine, solo, asked):
    for one in asked[:8]:
        events = list(engine.submit(one))
        assert all(event.finish_reason is None for event in events[:-1])
        if isinstance(solo[one.key], Answer):
            assert "".join(event.text for event in events) == solo[one.key].text
            assert len(events) == solo[one.key].usage.completion_tokens


def test_alternatives_are_the_best_ones(engine):
    """The LLM's own log-probabilities, whatever the temperature."""
    found = engine.submit(dataclasses.replace(LONG, sampling=Sampling(logprobs=5))).result(60)
    for token in found.tokens:
        values = [one.logprob for one in token.top]
        assert len(values) == 5 and values == sorted(values, reverse=True)
        assert (token.token, token.logprob) == (token.top[0].token, values[0])
        assert sum(np.exp(values)) <= 1.0001
    hot = engine.submit(dataclasses.replace(LONG, sampling=Sampling(9.0, seed=3, logprobs=5)))
    again = engine.submit(dataclasses.replace(LONG, sampling=Sampling(0.0, logprobs=5)))
    assert hot.result(60).tokens[0].top == again.result(60).tokens[0].top


def test_new_rows_compile_nothing_on_a_mesh_of_one_device(files):
    """Where a run's parameters lie; a request may be the first one in any bucket."""
    restored = small_engine.restored(prefix=False)  # without one, new rows read no parameters
    place = NamedSharding(mesh.make({"data": 1}, jax.devices()[:1]), PartitionSpec())
    params = jax.device_put(restored.params, place)
    made = small_engine.engine(dataclasses.replace(restored, params=params), slots=2)
    made.start()
    long = Request("96", Example("96", (("sensor", files[4]),) * 2, "图中有什么？" * 6))
    assert made.submit(long).result(60).usage.prompt_tokens > 64
    assert made.submit(LONG).result(60).tokens
    assert made.metrics()["compilations_since_warm_up_total"] == 0
    made.stop(0.0)


class Gate:
    """While it is closed, the engine makes no round but those that it is given."""

    def __init__(self, engine, monkeypatch):
        self.engine, self.closed, self._given = engine, False, queue.SimpleQueue()
        following = engine._next_round

        def held():
            if self.closed:
                self._given.get(timeout=60)
            return following()

        monkeypatch.setattr(engine, "_next_round", held)

    def fill(self, more: int = 0) -> list:
        """Closes; requests hold all slots, and `more` wait."""
        self.closed = True
        tickets = [self.engine.submit(LONG) for _ in range(small_engine.OPTIONS.slots)]
        wait_for(lambda: len(self.engine._prepared) + len(self.engine._rows) == len(tickets))
        self._given.put(None)
        wait_for(lambda: len(self.engine._rows) == len(tickets))
        return tickets + [self.engine.submit(LONG) for _ in range(more)]

    def open(self) -> None:
        self.closed = False
        self._given.put(None)


@pytest.fixture
def gate(engine, monkeypatch):
    made = Gate(engine, monkeypatch)
    yield made
    made.open()
    idle(engine)


def wait_for(condition) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.001)


def limit(engine, monkeypatch, **options) -> None:
    monkeypatch.setattr(engine, "options", dataclasses.replace(engine.options, **options))


def test_a_full_queue_refuses(engine, gate, monkeypatch):
    tickets = gate.fill(more=3)
    limit(engine, monkeypatch, queue=3)
    with pytest.raises(QueueFull) as caught:
        engine.submit(LONG)
    assert caught.value.status == 429
    gate.open()
    assert len({ticket.result(60).text for ticket in tickets}) == 1


def test_whoever_waits_too_long_is_told(engine, gate, monkeypatch):
    *running, waiting = gate.fill(more=1)
    limit(engine, monkeypatch, queue_seconds=0.0)
    gate.open()
    with pytest.raises(TimedOut, match="waited") as caught:
        waiting.result(60)
    assert caught.value.status == 503
    assert all(ticket.result(60).finish_reason for ticket in running)


def test_whoever_runs_too_long_is_told(engine, gate, monkeypatch):
    running = gate.fill()
    limit(engine, monkeypatch, request_seconds=0.0)
    gate.open()
    for ticket in running:
        with pytest.raises(TimedOut, match="took longer"):
            ticket.result(60)


def test_a_cancelled_request_leaves_its_slot_at_once(engine, gate):
    running = gate.fill()
    waiting = [engine.submit(LONG), engine.submit(dataclasses.replace(LONG, key="next"))]
    waiting[0].cancel()
    running[2].cancel()
    gate.open()
    events = list(running[2])
    assert events[-1].finish_reason == "cancelled" and len(events) <= 3
    gone = waiting[0].result(60)
    assert (gone.finish_reason, gone.text, gone.tokens) == ("cancelled", "", ())
    whole = running[0].result(60)
    assert waiting[1].result(60) == whole and running[3].result(60) == whole


def test_slow_files_hold_nobody_else(engine, files, monkeypatch):
    """Text is answered while a file is being read; a broken file costs its own request alone."""
    reading = threading.Event()

    def slow(*arguments):
        assert reading.wait(60)
        return modalities.load(*arguments)

    monkeypatch.setattr(engine._encoder, "_load", slow)
    monkeypatch.setattr(engine._encoder, "cache", file_encoder.MediaCache(10**6))
    seen = Request("seen", Example("seen", (("sensor", files[0]),), "是"))
    waiting = engine.submit(seen)
    assert engine.submit(LONG).result(60).tokens
    with pytest.raises(TimeoutError):
        waiting.get(0)
    reading.set()
    assert waiting.result(60).finish_reason in ("stop", "length")


def test_a_defect_costs_its_requests_alone(engine, monkeypatch):
    """What raises in the preparation or in a round is told, and the engine goes on."""
    whole = engine.submit(LONG).result(60)
    with monkeypatch.context() as broken:
        broken.setattr("xllm_jax.serve.preparation.open_prompt", lambda *_: 1 / 0)
        with pytest.raises(Defect, match="ZeroDivisionError"):
            engine.submit(LONG).result(60)
    with monkeypatch.context() as broken:
        broken.setattr(engine._slots, "_step", lambda *_: 1 / 0)
        with pytest.raises(Defect, match="ZeroDivisionError") as caught:
            engine.submit(LONG).result(60)
        assert caught.value.status == 500
    assert engine.ready and engine.submit(LONG).result(60) == whole


def test_an_unknown_modality_is_refused_at_once(engine):
    with pytest.raises(UserError, match="smell"):
        engine.submit(Request("x", Example("x", (("smell", "x"),), "?")))


def test_stopping_drains_then_cancels(restored):
    """Without a warm-up: it runs what others have compiled or compiles as it goes."""
    made = small_engine.engine(restored, length=64)
    made._encoder.warm_up = made._slots.warm_up = lambda *_: None
    made.start()
    tickets = [made.submit(dataclasses.replace(LONG, key=str(n))) for n in range(6)]
    tickets[0].get(60)
    step = made._slots.step
    stopped = threading.Thread(target=made.stop, args=(60.0,))
    stopped.start()
    while made.ready:
        time.sleep(0.001)
    with pytest.raises(Overloaded, match="stopping"):
        made.submit(LONG)
    made._slots.step = lambda kept: time.sleep(0.05) or step(kept)
    assert tickets[1].result(60).finish_reason in ("stop", "length")
    made.stop(0.0)  # a second signal does not wait
    stopped.join(60)
    assert not stopped.is_alive()
    ends = collections.Counter(ticket.result(1).finish_reason for ticket in tickets[2:])
    assert not made.ready and sum(ends.values()) == 4


def test_rows_are_written_in_place(engine):
    """A step holds no second copy of the keys and values, and gives none back."""
    slots = engine._slots
    kept = np.zeros(slots.plan.slots, bool)
    used = slots._step.lower(slots._params, slots._state, kept).compile().memory_analysis()
    assert used.alias_size_in_bytes >= slots.cache_bytes
    assert used.temp_size_in_bytes < slots.cache_bytes
