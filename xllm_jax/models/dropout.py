"""Dropout with one mask, drawn as whole words: cheap with the keys of `core/prng.py`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

Array = jax.Array


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
        words = jax.random.bits(self.make_rng("dropout"), x.shape, jnp.uint32)
        # One mask: left to itself, XLA writes the hash into every product that reads the values.
        kept = jax.lax.optimization_barrier(words >= jnp.uint32(round(self.rate * 2**32)))
        return jnp.where(kept, x * jnp.asarray(1 / (1 - self.rate), x.dtype), 0)
