"""Random keys whose numbers cost a tenth of JAX's own, on every backend and mesh the same.

JAX's generator (threefry) takes some 115 instructions for a pair of words, and as many whenever a
module folds its name into a key. A step with dropout in every sub-layer then spends more
instructions on random numbers than on the network: in stage 1, speech, they were a third of the
program that the TPU compiler had to work through. The hardware's generator is no way out, since XLA
lets every chip draw the numbers of all chips. Training needs no cryptography: here one 32-bit hash
of the element's index and the key gives each word, so that a sharded array is drawn where it lies.

The keys are ordinary JAX keys: `jax.random` takes them wherever it takes others.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.extend import random as extended

Array = jax.Array

# Words that keep the streams of `split`, `fold_in` and `seed` apart from that of the numbers.
SPLIT, FOLD, SEED = 0x9E3779B9, 0x85EBCA6B, 0xC2B2AE35


def hashed(words: Array, index: Array) -> Array:
    """One random word for every index.

    The mixer is the 32-bit one with the lowest known bias of its length (C. Wellons,
    "hash-prospector"); one word of the key goes in before each of its two products.

    Args:
      words: `[2]` uint32, the key.
      index: uint32 of any shape.

    Returns:
      uint32 in the shape of `index`.
    """
    x = index ^ words[0]
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = x ^ words[1]
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def indices(shape: tuple[int, ...]) -> Array:
    """The place of every element in an array of `shape`, uint32; beyond 2**32 they repeat."""
    index, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        place = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        index = index + place * jnp.uint32(stride % 2**32)
        stride *= shape[axis]
    return index


def key(seed: int | Array) -> Array:
    """A key of this kind from a seed; typed, shape `[]`."""
    return jax.random.key(seed, impl=HASHED)


def _bits(words: Array, width: int, shape: tuple[int, ...]) -> Array:
    dtype = {8: jnp.uint8, 16: jnp.uint16, 32: jnp.uint32, 64: jnp.uint64}[width]
    if width < 64:
        return hashed(words, indices(shape)).astype(dtype)
    halves = hashed(words, indices((2, *shape))).astype(dtype)
    return halves[0] << 32 | halves[1]


def _derived(words: Array, index: Array, purpose: int) -> Array:
    """A key for every index: `[..., 2]`. Its words come from the two orders of the parent's."""
    other = words ^ jnp.uint32(purpose)
    return jnp.stack([hashed(other, index), hashed(other[::-1], index)], axis=-1)


def _split(words: Array, shape: tuple[int, ...]) -> Array:
    count = jax.lax.iota(jnp.uint32, math.prod(shape))
    return _derived(words, count, SPLIT).reshape(*shape, 2)


def _fold_in(words: Array, number: Array) -> Array:
    return _derived(words, number.astype(jnp.uint32), FOLD)


def _seed(number: Array) -> Array:
    wide = number.dtype.itemsize > 4
    high = (number >> 32 if wide else jnp.zeros_like(number)).astype(jnp.uint32)
    words = jnp.stack([number.astype(jnp.uint32), high])
    return _derived(words, jnp.uint32(0), SEED)


HASHED = extended.define_prng_impl(
    key_shape=(2,),
    seed=_seed,
    split=_split,
    random_bits=_bits,
    fold_in=_fold_in,  # pyright: ignore[reportArgumentType]  JAX hands an array over, not an int
    name="hashed",
    tag="hash",
)
