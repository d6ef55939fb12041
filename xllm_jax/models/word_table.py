"""The two ends of an LLM on a mesh: rows of its word table, and scores against one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from xllm_jax.core import mesh

Array = jax.Array
VOCABULARY = ("tensor", "fsdp")


def embed(table: Array, ids: Array, dtype: DTypeLike) -> Array:
    """Word embeddings.

    Every device looks its part of the width up for all rows; moving these is far less than
    gathering the table.

    Args:
      table: `[vocab, D]`.
      ids: `[B, T]` int32.
      dtype: of the result.

    Returns:
      `[B, T, D]`.
    """
    x = jnp.take(table, mesh.constrain(ids, "data"), axis=0).astype(dtype)
    return mesh.constrain_rows(mesh.constrain(x, "data", None, "fsdp"))


def logits(table: Array, x: Array, dtype: DTypeLike) -> Array:
    """Scores of the next token.

    Each device scores its part of the vocabulary for the rows of all, since the states are far
    smaller than the head.

    Args:
      table: `[vocab, D]`.
      x: `[..., D]` final states.
      dtype: of the product's factors.

    Returns:
      `[..., vocab]` float32.
    """
    head = mesh.constrain(table.astype(dtype), VOCABULARY, None)
    x = mesh.constrain(x.astype(dtype), "data", *(None,) * (x.ndim - 1))
    scores = jnp.einsum("...d,vd->...v", x, head, preferred_element_type=jnp.float32)
    return mesh.constrain(scores, "data", *(None,) * (x.ndim - 2), VOCABULARY)
