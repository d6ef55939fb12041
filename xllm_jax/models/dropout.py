"""Dropout whose random numbers cost a tenth of JAX's own, on every backend and mesh the same.

JAX's generator (threefry) takes some 115 instructions for two words. A step with dropout in every
sub-layer then spends more instructions on masks than on the network: in stage 1, speech, they were
a third of the program that the TPU compiler had to work through. The hardware's generator is no way
out, since XLA lets every chip draw the numbers of all chips. A mask needs no cryptography: here one
32-bit hash of the element's index and the key decides.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

Array = jax.Array


def hashed_words(key: Array, shape: tuple[int, ...]) -> Array:
    """One random word for every element.

    The mixer is the 32-bit one with the lowest known bias of its length (C. Wellons,
    "hash-prospector"); one word of the key goes in before each of its two products.

    Args:
      key: a JAX key, typed or raw.
      shape: of the result; beyond 2**32 elements words repeat.

    Returns:
      `shape` uint32. An element depends on the key and its own index alone, so that a sharded
      array is drawn where it lies.
    """
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    words = (jax.random.key_data(key) if typed else key).astype(jnp.uint32)
    index, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        step = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        index = index + step * jnp.uint32(stride % 2**32)
        stride *= shape[axis]
    x = index ^ words[0]
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = x ^ words[-1]
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


class Dropout(nn.Module):
    """Sets a share `rate` of the values to zero and scales the others, from the key 'dropout'."""

    rate: float

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """Drops from `x` of any shape in training, else returns it."""
        if not train or not self.rate:
            return x
        if self.rate >= 1:
            return jnp.zeros_like(x)
        words = hashed_words(self.make_rng("dropout"), x.shape)
        # One mask: left to itself, XLA writes the hash into every product that reads the values.
        kept = jax.lax.optimization_barrier(words >= jnp.uint32(round(self.rate * 2**32)))
        return jnp.where(kept, x * jnp.asarray(1 / (1 - self.rate), x.dtype), 0)
