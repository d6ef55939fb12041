"""Dropout: its share, its independence of neighbours, layers and keys, and its meshes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from xllm_jax.models.dropout import Dropout, hashed_words

MIXER = (0x7FEB352D, 0x846CA68B)


def drop(rate: float, x: jax.Array, key: jax.Array, train: bool = True) -> jax.Array:
    return Dropout(rate).apply({}, x, train, rngs={"dropout": key})


def in_python(index: int, first: int, last: int) -> int:
    """The hash of one index with Python's integers."""
    x = index ^ first
    x = (x ^ x >> 16) * MIXER[0] % 2**32 ^ last
    x = (x ^ x >> 15) * MIXER[1] % 2**32
    return x ^ x >> 16


def test_words_are_the_hash_of_key_and_index():
    words = np.asarray(hashed_words(jnp.array([7, 2**31 + 5], jnp.uint32), (3, 2, 5)))
    expected = [in_python(index, 7, 2**31 + 5) for index in range(30)]
    np.testing.assert_array_equal(words.ravel(), np.array(expected, np.uint32))


def test_typed_and_raw_keys_are_the_same():
    typed, raw = jax.random.key(3), jax.random.PRNGKey(3)
    np.testing.assert_array_equal(hashed_words(typed, (9,)), hashed_words(raw, (9,)))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_share_and_expected_value(rate):
    y = np.asarray(drop(rate, jnp.ones((64, 1000)), jax.random.key(0)))
    deviation = (rate * (1 - rate) / y.size) ** 0.5
    assert (y == 0).mean() == pytest.approx(rate, abs=4 * deviation)
    np.testing.assert_allclose(y[y != 0], 1 / (1 - rate), rtol=1e-6)


def test_edges_leave_all_or_nothing():
    x = jnp.arange(1.0, 5.0)
    np.testing.assert_array_equal(drop(0.0, x, jax.random.key(0)), x)
    np.testing.assert_array_equal(drop(0.3, x, jax.random.key(0), train=False), x)
    np.testing.assert_array_equal(drop(1.0, x, jax.random.key(0)), jnp.zeros(4))


def test_bits_are_fair_and_uncorrelated():
    """Each bit, each pair of bits, and each bit against the same bit of its neighbours."""
    keys = jax.random.split(jax.random.key(5), 4)
    words = np.stack([np.asarray(hashed_words(key, (256, 512))) for key in keys]).reshape(4, -1)
    bits = (words[..., None] >> np.arange(32, dtype=np.uint32) & 1).astype(np.float32) * 2 - 1
    bound = 5.5 * words.shape[1] ** -0.5
    assert np.abs(bits.mean(1)).max() < bound
    for one in bits:
        pairs = one.T @ one / len(one) - np.eye(32)
        assert np.abs(pairs).max() < bound
        for lag in (1, 2, 3, 8, 64, 512):
            assert np.abs((one[lag:] * one[:-lag]).mean(0)).max() < 1.01 * bound
    between = np.einsum("kib,lib->klb", bits, bits) / words.shape[1]
    assert np.abs(between[~np.eye(4, dtype=bool)]).max() < bound


def test_kept_counts_of_rows_spread_as_a_binomial_does():
    """Neither rows nor columns know each other: the variance of their counts is that of coins."""
    kept = np.asarray(drop(0.1, jnp.ones((512, 768)), jax.random.key(11))) != 0
    for counts, size in ((kept.sum(0), 512), (kept.sum(1), 768)):
        ratio = counts.var(ddof=1) / (size * 0.09)
        assert ratio == pytest.approx(1, abs=5 * (2 / len(counts)) ** 0.5)


def test_gradient_passes_where_values_do():
    x, key = jnp.ones((8, 16)), jax.random.key(2)
    gradient = jax.grad(lambda x: drop(0.4, x, key).sum())(x)
    np.testing.assert_array_equal(gradient, drop(0.4, x, key))


def test_a_sharded_array_gets_the_mask_of_the_whole():
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    x, key = jnp.ones((8 * jax.device_count(), 24)), jax.random.key(4)
    sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    run = jax.jit(lambda x: drop(0.3, x, key))
    np.testing.assert_array_equal(run(sharded), run(x))
