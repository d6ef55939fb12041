"""The engine with a causal LLM of LLaMA's kind: an answer is the one that a request gets alone."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
import small_engine
import test_causal_family as causal_text
import test_new_modality as sensor

from xllm_jax.assembly import networks
from xllm_jax.core.stage import Part
from xllm_jax.data.example import Example
from xllm_jax.data.text.llm_families import causal
from xllm_jax.inference.assistant import Assistant
from xllm_jax.inference.load_run import Restored
from xllm_jax.serve.request import Answer, Request

LLAMA = {"vocab": 448, "width": 32, "depth": 2, "heads": 4, "hidden": 48, "key_heads": 2}


@pytest.fixture(scope="module")
def restored(tmp_path_factory):
    """Random networks whose answers vary from prompt to prompt, and end."""
    folder = causal_text.write_fast(tmp_path_factory.mktemp("text") / "llama", "llama3")
    stage = sensor.stage()
    told = {"tokenizer": str(folder), "llm_family": "causal", "template": "llama3"}
    stage = dataclasses.replace(
        stage,
        parts=stage.parts | {"llm": Part("causal.Causal", "tiny", LLAMA)},
        data=dataclasses.replace(stage.data, **told),
    )
    model = networks.model(stage)
    rng = np.random.default_rng(3)
    params = jax.tree.map(
        lambda x: rng.normal(scale=0.4, size=x.shape).astype(np.float32), networks.shapes(model)
    )
    params["llm"] = jax.tree_util.tree_map_with_path(small_engine._plain, params["llm"])
    params["llm"]["head"][causal.Family(str(folder)).ends[0]] *= 2.0
    return Restored(model, params, stage)


@pytest.fixture(scope="module")
def engine(restored):
    made = small_engine.engine(restored, length=192)
    made.start()
    yield made
    made.stop(0.0)


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    files = small_engine.series(tmp_path_factory.mktemp("series"), 3)
    return small_engine.requests(files, 20)


def test_an_answer_is_the_one_alone_whatever_else_runs(engine, asked):
    solo = small_engine.alone(engine, asked)
    answers = [one for one in solo.values() if isinstance(one, Answer)]
    assert len({one.text for one in answers}) > 8
    assert {"stop", "length"} == {one.finish_reason for one in answers}
    rng = np.random.default_rng(1)
    for _ in range(60):
        mix = [asked[number] for number in rng.integers(0, len(asked), 5)]
        tickets = [engine.submit(one) for one in mix]
        for one, ticket in zip(mix, tickets):
            assert small_engine.outcome(ticket) == solo[one.key], one
    metrics = engine.metrics()
    assert metrics["compilations_since_warm_up_total"] == 0
    assert metrics["context_cache_hits_total"] > 100


def test_greedy_answers_are_those_of_the_assistant(restored, engine, asked):
    model = Assistant(restored, rows=1, max_tokens=small_engine.OPTIONS.max_tokens)
    media = next(one.example.media for one in asked if len(one.example.media) == 1)
    examples = [Example("a", (), "图中有什么？"), Example("b", media, "red circle")]
    wanted = [model.answers([one])[0] for one in examples]
    found = [engine.submit(Request(one.key, one)).result(60).text for one in examples]
    assert found == wanted and wanted[0] != wanted[1]
