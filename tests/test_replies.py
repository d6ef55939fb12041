"""Answers with pictures: whole runs however they are decoded, and what projections read there."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_outputs

from xllm_jax.assembly import parameters
from xllm_jax.assembly.system import System
from xllm_jax.core import mesh
from xllm_jax.data.example import Example
from xllm_jax.inference import decoding
from xllm_jax.inference.assistant import Assistant
from xllm_jax.inference.load_run import Restored
from xllm_jax.inference.replies import Picture
from xllm_jax.inference.whole_runs import permitted

FIRST, COUNT = small_outputs.FIRST, small_outputs.COUNT
LIKING = 9.0  # how much the LLM likes to begin a picture
ASKED = [Example(str(n), instruction=text) for n, text in enumerate(("画圆", "请画图：红色", "红"))]
WAYS = {
    "greedy": {},
    "sampling": {"sample": True, "temperature": 3.0},
    "nucleus": {"sample": True, "top_p": 0.9, "top_k": 40},
    "beams": {"beams": 3},
}


@pytest.fixture(scope="module")
def restored(tmp_path_factory):
    """An LLM that likes to begin pictures: the first signal token leads by a little everywhere."""
    stage = small_outputs.stage(tmp_path_factory.mktemp("outputs"))
    stage.parts["image_projection"].fields["llm_layers"] = (-1, 1)
    system = System.build(stage, mesh.make({}))
    params = parameters.parameters(system)
    params = jax.tree.map(lambda x: x * 6 if x.ndim > 1 else x, params)
    model = Assistant(Restored(system.model, params, stage), rows=3)
    batch = model.batch([model.prompt(one, {}) for one in ASKED], {})
    state = system.model.hidden(params, batch).mean((0, 1))
    rows = params["signal_tokens"]
    head = rows["image_head"].at[0].set(state / jnp.linalg.norm(state) * LIKING)
    params = params | {"signal_tokens": rows | {"image_head": head}}
    return Restored(system.model, params, stage)


def runs_of(tokens):
    """Signal tokens of a row as a text of their numbers."""
    return "".join(str(t - FIRST) for t in tokens if FIRST <= t < FIRST + COUNT)


def beginning(restored, model):
    """The same LLM, whose likeliest answers begin with a picture."""
    batch = model.batch([model.prompt(one, {}) for one in ASKED], {})
    states = np.asarray(model.model.hidden(model.params, batch))
    last = (np.asarray(batch.segments) > 0).sum(1) - 1
    state = states[np.arange(len(ASKED)), last].mean(0)
    rows = restored.params["signal_tokens"]
    head = rows["image_head"].at[0].set(state * 1e3 / np.linalg.norm(state))
    params = restored.params | {"signal_tokens": rows | {"image_head": head}}
    return dataclasses.replace(restored, params=params)


@pytest.mark.parametrize(
    ("way", "most"),
    [
        ("greedy", 13),
        ("sampling", 3),
        ("sampling", 13),
        ("nucleus", 13),
        ("beams", 6),
        ("beams", 13),
    ],
)
def test_every_run_is_whole(restored, way, most):
    """However the tokens are chosen, and wherever the answer ends."""
    model = Assistant(restored, rows=3, max_tokens=most)
    if "sample" not in WAYS[way]:
        model = Assistant(beginning(restored, model), rows=3, max_tokens=most)
    how = model.decoding(**WAYS[way])
    prompts = [model.prompt(one, {}) for one in ASKED]
    batch = model.batch(prompts, {})
    tokens = []
    for seed in range(2):
        made = decoding.generate(
            model.model.encoded, model.params, batch, how, jax.random.key(seed)
        )
        tokens += np.asarray(made.tokens).reshape(-1, most).tolist()
    wanted = "".join(map(str, range(COUNT)))
    assert all(runs_of(row).replace(wanted, "") == "" for row in tokens)
    for row in tokens:  # and consecutive
        starts = [n for n, token in enumerate(row) if token == FIRST]
        assert all(row[n : n + COUNT] == list(range(FIRST, FIRST + COUNT)) for n in starts)
    assert any(map(runs_of, tokens)) == (most >= COUNT), "nothing was tried"


def test_without_signal_tokens_nothing_is_banned():
    scores = jax.random.normal(jax.random.key(0), (2, 9))
    np.testing.assert_array_equal(permitted(scores, jnp.array([1, 2]), 0, (), 4), scores)


def test_what_may_follow():
    def allowed(last, step, most=10):
        scores = permitted(jnp.zeros((1, 12)), jnp.array([last]), step, ((4, 3), (8, 2)), most)
        return np.flatnonzero(np.isfinite(scores[0])).tolist()

    text = [0, 1, 2, 3, 7, 10, 11]
    assert allowed(-1, 0) == sorted([*text, 4, 8])
    assert allowed(4, 3) == [5] and allowed(5, 4) == [6]
    assert allowed(6, 5) == sorted([*text, 4, 8])  # another picture may follow at once
    assert allowed(1, 7) == sorted([*text, 4, 8]) and allowed(1, 8) == sorted([*text, 8])
    assert allowed(1, 9) == text
    assert allowed(8, 9) == [9]  # the last token of the answer


def test_what_may_follow_where_a_word_stands_between():
    """Runs of NExT-GPT's second version: 2 n - 1 positions."""

    def allowed(last, step, before=-1, most=10):
        runs = ((4, 3, 1),)
        arrays = (jnp.zeros((1, 9)), jnp.array([last]), step, runs, most, jnp.array([before]))
        return np.flatnonzero(np.isfinite(permitted(*arrays)[0])).tolist()

    assert allowed(4, 3, 1) == [1] and allowed(5, 5, 1) == [1]
    assert allowed(1, 4, 4) == [5] and allowed(1, 6, 5) == [6]
    anything = [0, 1, 2, 3, 4, 7, 8]
    assert allowed(6, 5, 1, 12) == anything  # behind the last one
    assert allowed(1, 5, 6) == allowed(1, 5, 3) == anything  # the word by itself
    assert 4 in allowed(0, 5, 1) and 4 not in allowed(0, 6, 1)  # five places are needed


def test_a_word_between_is_written_and_read(restored):
    """Trained, forced and read alike: seven positions a run."""
    stage = restored.stage
    signals = {"image": dataclasses.replace(stage.data.signals["image"], between=20)}
    stage = dataclasses.replace(stage, data=dataclasses.replace(stage.data, signals=signals))
    system = System.build(stage, mesh.make({}))
    assert system.model.spans == {"image": 2 * COUNT - 1}
    model = Assistant(Restored(system.model, restored.params, stage), rows=3, max_tokens=40)
    how = model.decoding(sample=True, temperature=1.5)
    prompts = sorted((model.prompt(one, {}) for one in ASKED), key=lambda one: len(one.ids))
    _, key = jax.random.split(jax.random.key(0))
    made = decoding.generate(model.model.encoded, model.params, model.batch(prompts, {}), how, key)
    tokens, replies = np.asarray(made.tokens), model.replies(ASKED, how, 0)
    assert any(one.pictures for one in replies)
    run = list(signals["image"].ids)
    assert run[::2] == list(range(FIRST, FIRST + COUNT)) and set(run[1::2]) == {20}
    for row in tokens.tolist():
        starts = [n for n, token in enumerate(row) if token == FIRST]
        assert all(row[n : n + len(run)] == run for n in starts)
        others = [token for token in row if FIRST < token < FIRST + COUNT]
        assert len(others) == (COUNT - 1) * len(starts)
    assert sum(len(one.pictures) for one in replies) == (tokens == FIRST).sum()


def feeding(model):
    """`(params, cache, ids, segments, context, positions) -> (embeddings, states, …)`, compiled."""

    def feed(params, cache, ids, *layout):
        llm = model.llm(params)
        x = llm(ids, method="embed")
        return x, *llm(x, *layout, cache, watched=jnp.zeros((1, 1), jnp.int32))

    return jax.jit(feed)


def fed(feed, llm, params, prompt, tokens, layers):
    """States of each token when it is fed, one by one into a cache, and embeddings there."""
    given = (prompt.ids, prompt.segments, prompt.context, prompt.positions)
    cache = llm(1, 64, method="init_cache")
    _, _, cache, _ = feed(params, cache, *(jnp.asarray(x)[None] for x in given))
    position = np.asarray(prompt.positions[-1])
    states, words, one = [], [], jnp.ones((1, 1), jnp.int32)
    for token in tokens:
        position = position + np.array([0, 1])
        place = jnp.asarray(position)[None, None]
        x, final, cache, seen = feed(params, cache, token * one, one, one < 0, place)
        states.append([final[0, 0] if n == -1 else seen[n, 0, 0] for n in layers])
        words.append(x[0, 0])
    return np.asarray(states), np.asarray(words)


def test_pictures_are_read_where_the_tokens_were_fed(restored):
    """The last token of an answer has a state too."""
    model = Assistant(restored, rows=3, max_tokens=6)
    how = model.decoding(sample=True, temperature=1.5)
    found, feed = 0, feeding(model.model)
    llm = model.model.llm(model.params)
    project = jax.jit(lambda *x: model.model.apply(model.params, "image_projection", *x))
    for seed in range(3):
        prompts = [model.prompt(one, {}) for one in ASKED]
        order = sorted(range(3), key=lambda i: len(prompts[i].ids))
        replies = model.replies(ASKED, how, seed)
        batch = model.batch([prompts[i] for i in order], {})
        _, key = jax.random.split(jax.random.key(seed))
        tokens = decoding.generate(model.model.encoded, model.params, batch, how, key).tokens
        for row, number in enumerate(order):
            said = np.asarray(tokens[row]).tolist()
            starts = [n for n, token in enumerate(said) if token == FIRST]
            pictures = replies[number].pictures
            assert len(pictures) == len(starts)
            states, words = fed(feed, llm, model.params, prompts[number], said, (-1, 1))
            for start, picture in zip(starts, pictures):
                at = slice(start, start + COUNT)
                wanted = project(states[at].swapaxes(0, 1)[None], words[None, at])
                np.testing.assert_allclose(picture.embeddings, wanted[0], rtol=2e-4, atol=2e-4)
                found += 1
    assert found > 3


def test_a_reply_keeps_its_order(restored):
    """Text before, between and after, whatever stands beside in the batch."""
    model = Assistant(restored, rows=3, max_tokens=14)
    how = model.decoding(sample=True, temperature=2.5)
    kinds = set()
    for seed in range(4):
        for reply in model.replies(ASKED, how, seed):
            kinds.add("".join("P" if isinstance(p, Picture) else "t" for p in reply.pieces))
            words = "".join(piece for piece in reply.pieces if isinstance(piece, str))
            assert reply.text(model.family) == model.family.finish(words)
    assert any("tPt" in kind for kind in kinds), kinds
    assert any(kind.count("P") > 1 for kind in kinds), kinds


def test_other_rows_change_no_picture(restored):
    alone = Assistant(restored, rows=1, max_tokens=8)
    many = Assistant(restored, rows=3, max_tokens=8)
    together = many.replies(ASKED)
    for example, reply in zip(ASKED, together):
        (single,) = alone.replies([example])
        assert single.text(alone.family) == reply.text(many.family)
        assert len(single.pictures) == len(reply.pictures)
        for one, other in zip(single.pictures, reply.pictures):
            np.testing.assert_allclose(one.embeddings, other.embeddings, rtol=1e-4, atol=1e-4)
    assert many.answers(ASKED) == [reply.text(many.family) for reply in together]


def test_a_model_without_signal_tokens_decodes_as_before(restored):
    data = dataclasses.replace(restored.stage.data, signals={})
    stage = dataclasses.replace(restored.stage, data=data)
    assert Assistant(dataclasses.replace(restored, stage=stage)).decoding().signals == ()
