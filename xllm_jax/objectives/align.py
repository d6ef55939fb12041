"""Decoding-side alignment: what the LLM's states say of a picture comes near to what its caption
says (NExT-GPT, arXiv 2309.05519, section 3.2).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def distances(made: Array, wanted: Array) -> Array:
    """Euclidean distances over the last axis, in float32; the gradient is 0 where they are 0.

    Args:
      made, wanted: `[..., width]`.

    Returns:
      `[...]`.
    """
    squares = jnp.square(made.astype(jnp.float32) - wanted.astype(jnp.float32)).sum(-1)
    apart = squares > 0
    return jnp.where(apart, jnp.sqrt(jnp.where(apart, squares, 1.0)), 0.0)
