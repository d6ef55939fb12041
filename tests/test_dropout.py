"""Dropout: its share, its expected value, its spread over rows, its gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xllm_jax.core import prng
from xllm_jax.models.dropout import Dropout

KEYS = {"hashed": prng.key, "threefry": jax.random.key, "raw": jax.random.PRNGKey}


def drop(rate: float, x: jax.Array, key: jax.Array, train: bool = True) -> jax.Array:
    return Dropout(rate).apply({}, x, train, rngs={"dropout": key})


@pytest.mark.parametrize("kind", list(KEYS))
@pytest.mark.parametrize("rate", [0.1, 0.9])
def test_share_and_expected_value(rate, kind):
    y = np.asarray(drop(rate, jnp.ones((64, 1000)), KEYS[kind](0)))
    deviation = (rate * (1 - rate) / y.size) ** 0.5
    assert (y == 0).mean() == pytest.approx(rate, abs=4 * deviation)
    np.testing.assert_allclose(y[y != 0], 1 / (1 - rate), rtol=1e-6)


def test_edges_leave_all_or_nothing():
    x, key = jnp.arange(1.0, 5.0), prng.key(0)
    np.testing.assert_array_equal(drop(0.0, x, key), x)
    np.testing.assert_array_equal(drop(0.3, x, key, train=False), x)
    np.testing.assert_array_equal(drop(1.0, x, key), jnp.zeros(4))


def test_kept_counts_of_rows_spread_as_a_binomial_does():
    """Neither rows nor columns know each other: the variance of their counts is that of coins."""
    kept = np.asarray(drop(0.1, jnp.ones((512, 768)), prng.key(11))) != 0
    for counts, size in ((kept.sum(0), 512), (kept.sum(1), 768)):
        ratio = counts.var(ddof=1) / (size * 0.09)
        assert ratio == pytest.approx(1, abs=5 * (2 / len(counts)) ** 0.5)


def test_gradient_passes_where_values_do():
    x, key = jnp.ones((8, 16)), prng.key(2)
    gradient = jax.grad(lambda x: drop(0.4, x, key).sum())(x)
    np.testing.assert_array_equal(gradient, drop(0.4, x, key))
