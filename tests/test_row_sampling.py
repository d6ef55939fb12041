"""Rows with settings of their own: filters as those of `decoding`, streams of seed and step."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xllm_jax.inference import decoding
from xllm_jax.inference.row_sampling import Settings, choose_rows, filter_rows, stream_of
from xllm_jax.inference.whole_runs import permitted

ROWS, VOCAB = 12, 50


@pytest.fixture(scope="module")
def logits():
    return jnp.asarray(np.random.default_rng(0).normal(scale=2, size=(ROWS, VOCAB)), jnp.float32)


def settings(seeds, temperature, top_k=0, top_p=1.0, told=False) -> Settings:
    count = len(seeds)
    return Settings(
        stream=np.stack(list(map(stream_of, seeds))),
        temperature=np.full(count, temperature, np.float32),
        top_k=np.full(count, top_k, np.int32),
        top_p=np.full(count, top_p, np.float32),
        most=np.full(count, 9, np.int32),
        told=np.full(count, told),
    )


def test_every_row_has_its_own_filters(logits):
    rng = np.random.default_rng(1)
    top_k = rng.choice([0, 1, 5, VOCAB, 10**6], ROWS).astype(np.int32)
    top_p = rng.choice([1.0, 0.9, 0.5, 1e-6], ROWS).astype(np.float32)
    found = np.asarray(filter_rows(logits, jnp.asarray(top_k), jnp.asarray(top_p)))
    for row in range(ROWS):
        count, share = min(int(top_k[row]), VOCAB), float(top_p[row])
        wanted = decoding.filter_logits(logits[row : row + 1], 1.0, count, share)[0]
        np.testing.assert_array_equal(found[row], wanted)


choose = jax.jit(choose_rows)


def test_a_draw_depends_on_seed_and_step_alone(logits):
    """Not on the row's place, nor on what its neighbors want."""
    step = jnp.arange(ROWS, dtype=jnp.int32)
    seeds = [7, 2**40 + 7, 2**64 - 1, -1] * 3
    active = jnp.ones(ROWS, bool)
    found = choose(logits, settings(seeds, 3.0), step, active)
    order = np.random.default_rng(2).permutation(ROWS)
    moved = settings([seeds[n] for n in order], 3.0)
    again = choose(logits[order], moved, step[order], active)
    np.testing.assert_array_equal(again.tokens, found.tokens[order])
    np.testing.assert_array_equal(again.logprobs, found.logprobs[order])
    beside = settings(seeds, 3.0, top_k=2)
    beside.temperature[1:], beside.top_k[0] = 0.0, 0
    mixed = choose(logits, beside, step, active)
    assert mixed.tokens[0] == found.tokens[0]
    np.testing.assert_array_equal(mixed.tokens[1:], logits[1:].argmax(-1))
    alike = jnp.tile(logits[:1], (ROWS, 1))
    drawn = choose(alike, settings([7] * ROWS, 3.0), step, active).tokens
    assert len(set(drawn.tolist())) > 3, "every step draws anew"
    same = choose(alike, settings([7, -1, 2**64 - 1] * 4, 3.0), step * 0, active).tokens
    assert same[1] == same[2] and len({stream_of(n).tobytes() for n in (7, 2**40 + 7)}) == 2


def test_draws_follow_the_distribution(logits):
    rows = 4000
    alike = jnp.tile(logits[:1], (rows, 1))
    made = choose(
        alike, settings(range(rows), 2.0, 8), jnp.zeros(rows, jnp.int32), jnp.ones(rows, bool)
    )
    shares = np.bincount(made.tokens, minlength=VOCAB) / rows
    filtered = decoding.filter_logits(logits[:1], 2.0, 8, 1.0)[0]
    np.testing.assert_allclose(shares, jax.nn.softmax(filtered), atol=0.03)


def test_log_probabilities_are_those_of_the_llm(logits):
    made = choose(
        logits,
        settings([1] * ROWS, 5.0, told=True),
        jnp.zeros(ROWS, jnp.int32),
        jnp.ones(ROWS, bool),
    )
    exact = np.asarray(logits, np.float64)
    exact = exact - np.log(np.exp(exact).sum(-1, keepdims=True))
    rows = np.arange(ROWS)
    np.testing.assert_allclose(made.logprobs, exact[rows, made.tokens], atol=1e-5)
    np.testing.assert_array_equal(made.top_tokens[:, 0], exact.argmax(-1))
    np.testing.assert_allclose(made.top_logprobs, -np.sort(-exact)[:, :20], atol=1e-5)


def test_runs_of_signal_tokens_begin_where_each_row_has_room():
    step, most = jnp.array([0, 3, 3]), jnp.array([4, 4, 6])
    last = jnp.full(3, -1)
    scores = permitted(jnp.zeros((3, 12)), last, step, ((4, 3),), most)
    np.testing.assert_array_equal(np.isfinite(scores[:, 4]), [True, False, True])
