"""Hashed keys: the hash itself, fair and independent numbers, streams that know nothing of others.

Bounds of random quantities are 5.5 standard deviations.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from xllm_jax.core import prng


def in_python(index: int, first: int, last: int) -> int:
    """The hash of one index with Python's integers."""
    x = index ^ first
    x = (x ^ x >> 16) * 0x7FEB352D % 2**32 ^ last
    x = (x ^ x >> 15) * 0x846CA68B % 2**32
    return x ^ x >> 16


def test_words_are_the_hash_of_key_and_index():
    key = jax.random.wrap_key_data(jnp.array([7, 2**31 + 5], jnp.uint32), impl=prng.HASHED)
    words = np.asarray(jax.random.bits(key, (3, 2, 5), jnp.uint32))
    expected = [in_python(index, 7, 2**31 + 5) for index in range(30)]
    np.testing.assert_array_equal(words.ravel(), np.array(expected, np.uint32))


def streams() -> dict[str, jax.Array]:
    """Four keys each, made in the ways that keys are made."""
    key = prng.key(5)
    return {
        "seeds": jnp.stack([prng.key(number) for number in range(4)]),
        "split": jax.random.split(key, 4),
        "folded": jax.vmap(lambda number: jax.random.fold_in(key, number))(jnp.arange(4)),
        "parent and children": jnp.stack([key, *jax.random.split(key), jax.random.fold_in(key, 0)]),
        "folded twice": jnp.stack(
            [jax.random.fold_in(jax.random.fold_in(key, a), b) for a in (0, 1) for b in (0, 1)]
        ),
    }


@pytest.mark.parametrize(
    "made", ["seeds", "split", "folded", "parent and children", "folded twice"]
)
def test_bits_are_fair_and_uncorrelated(made):
    """Each bit, each pair of bits of a word, each bit against neighbors and other streams."""
    words = np.stack([jax.random.bits(key, (128, 512), jnp.uint32) for key in streams()[made]])
    words = words.reshape(4, -1)
    bits = (words[..., None] >> np.arange(32, dtype=np.uint32) & 1).astype(np.float32) * 2 - 1
    bound = 5.5 * words.shape[1] ** -0.5
    assert np.abs(bits.mean(1)).max() < bound
    for one in bits:
        assert np.abs(one.T @ one / len(one) - np.eye(32)).max() < bound
        for lag in (1, 2, 3, 8, 64, 512):
            assert np.abs((one[lag:] * one[:-lag]).mean(0)).max() < 1.01 * bound
    between = np.einsum("kib,lib->klb", bits, bits) / words.shape[1]
    assert np.abs(between[~np.eye(4, dtype=bool)]).max() < bound


def test_uniform_and_normal_numbers_have_their_moments():
    x = np.asarray(jax.random.normal(prng.key(3), (200_000,)), np.float64)
    size = len(x)
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert np.mean(x**power) == pytest.approx(expected, abs=5.5 * (variance / size) ** 0.5)
    counts = np.histogram(jax.random.uniform(prng.key(4), (size,)), 100, (0, 1))[0]
    chi_square = np.sum(np.square(counts - size / 100) / (size / 100))
    assert abs(chi_square - 99) < 5.5 * (2 * 99) ** 0.5


def test_a_thousand_derived_keys_are_all_different():
    keys = jax.random.split(prng.key(0), 1000)
    folded = jax.vmap(lambda n: jax.random.fold_in(prng.key(0), n))(jnp.arange(1000))
    data = np.concatenate([jax.random.key_data(keys), jax.random.key_data(folded)])
    assert len(np.unique(data, axis=0)) == 2000


def test_a_sharded_array_gets_the_numbers_of_the_whole():
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    split = NamedSharding(mesh, PartitionSpec("data"))
    shape = (8 * jax.device_count(), 24)

    def draw() -> jax.Array:
        return jax.random.bits(prng.key(4), shape, jnp.uint32)

    np.testing.assert_array_equal(jax.jit(draw, out_shardings=split)(), draw())
