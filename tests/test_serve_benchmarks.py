"""The measurements of the server: they run, and they find what they are made to find."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

import pytest
import served
import small_runs

from xllm_jax.data.media import modalities
from xllm_jax.inference import load_run
from xllm_jax.serve import app
from xllm_jax.serve.limits import Limits
from xllm_jax.serve.scheduler import Options, Scheduler
from xllm_jax.serve.service import Card

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import serve  # noqa: E402
import serve_model  # noqa: E402
import serve_soak  # noqa: E402
import serve_torch  # noqa: E402
import soak_requests  # noqa: E402

LIMITS = Limits(
    body=soak_requests.BODY,
    bodies=8 * soak_requests.BODY,
    media=4,
    pixels=250_000,
    frames=120,
    sound_seconds=9,
    decoders=1,
)
PLAN = serve_soak.Plan(requests=100, clients=4, different=20)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Files of a world."""
    world = small_runs.make_world(tmp_path_factory.mktemp("soaked"), items=4)
    return soak_requests.files(world, 4)


@pytest.fixture(scope="module")
def workers():
    with served.decoders() as made:
        yield made


def soak(given, workers, change=lambda engine: None) -> dict:
    """A small soak of a server whose engine has no model."""
    ears = served.FakeEars()
    with served.fake(workers, limits=LIMITS, ears=ears, log=None) as (url, engine, _):
        change(engine)
        return serve_soak.soak(int(url.rpartition(":")[2]), os.getpid(), given, PLAN)


def test_a_soak_of_a_server_that_keeps_its_promises(given, workers):
    found = soak(given, workers)
    assert not found["wrong"] and found["idle"] and not found["compiled"]
    # The engine of the tests opens no picture, so that half a one is as good as a whole one.
    assert found["alone"] == ["broken 15: 200"]
    assert {"200", "400", "404", "413", "415"} <= found["statuses"].keys()
    assert {"text", "image", "speech", "video", "both", "heard", "left", "broken", "large"} >= set(
        found["kinds"]
    )
    assert sum(found["kinds"].values()) == found["requests"] == PLAN.requests
    assert found["different answers"] > 10


def test_answers_that_depend_on_others_are_found(given, workers):
    """An engine that says at times what it said to the one before."""

    def change(engine):
        written, before = engine._written, []

        def mixed(ticket):
            before.append(ticket)
            engine.text = "else" if len(before) % 9 == 8 and len(before) > 60 else ""
            return written(ticket)

        engine._written = mixed

    assert soak(given, workers, change)["wrong"]


def test_memory_that_grows_is_found():
    flat = [100e6 + n % 3 for n in range(100)]
    assert serve_soak.flatness(flat)["growth"] == 0
    grown = serve_soak.flatness([one + 1e5 * n for n, one in enumerate(flat)])
    assert grown["growth"] > serve_soak.FLAT and grown["last MB"] > grown["first MB"]
    early = serve_soak.flatness([one + 1e6 * min(n, 8) for n, one in enumerate(flat)])
    assert early["growth"] == 0  # the warm-up may


@pytest.fixture(scope="module")
def contenders(workers, tmp_path_factory):
    """All three with the same small LLM, in this process."""
    sizes = serve_model.Sizes(vocab=1024, width=32, depth=1, heads=2, hidden=64)
    made = serve_model.make(tmp_path_factory.mktemp("contenders"), sizes)
    options = Options(slots=2, length=64, max_tokens=8)
    engine = Scheduler(load_run.load_run(made.run), options, load=modalities.load)
    engine.start()
    model = serve_torch.Model(str(made.published))
    ours = app.create(served.service(engine, workers, card=Card("run", ())))
    with contextlib.ExitStack() as stack:
        started = [
            serve.Server(name, int(url.rpartition(":")[2]), os.getpid())
            for name, one in (
                (serve.OURS, ours),
                (serve.THEIRS, serve_torch.create(model)),
                (serve.BATCHED, serve_torch.create(model, 2)),
            )
            for url in [stack.enter_context(served.running(one))]
        ]
        yield started
        engine.stop(0.0)


def test_contenders_say_the_same_and_are_measured(contenders):
    questions = serve_model.questions(5)
    serve.compare(contenders, questions, 6)
    rows = serve.measure(contenders, [1, 2], rounds=2, requests=4, tokens=6)
    assert {(row["clients"], row["server"]) for row in rows} == {
        (clients, one.name) for clients in (1, 2) for one in contenders
    }
    assert all(0 < row["first_token_median"] <= row["whole_median"] for row in rows)
    table = serve.table({"rows": rows})
    assert table.count(" 1.00 |") >= 2 and len(table.splitlines()) == 2 + len(rows)


def test_contenders_that_differ_are_not_measured(contenders, monkeypatch):
    ask = serve.Client.ask

    def shorter(client, question, tokens):
        cut = client.connection.port == contenders[1].port
        return ask(client, question, tokens - cut)

    monkeypatch.setattr(serve.Client, "ask", shorter)
    with pytest.raises(SystemExit, match=r"transformers: .* instead of"):
        serve.compare(contenders[:2], serve_model.questions(3), 4)
