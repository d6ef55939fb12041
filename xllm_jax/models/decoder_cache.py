"""Keys and values of the tokens so far, and who of them sees whom: what all LLMs here share."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Array = jax.Array
Cache = dict[str, Array]
Memory = tuple[Array, Array, Array] | None  # layer number, keys and values of all layers

PREFIX = -(2**31)  # the segment of a learned prefix in the cache


def visible(
    query_segments: Array, query_slots: Array, segments: Array, context: Array, slots: Array
) -> Array:
    """Who sees whom: the context is bidirectional, everything after it causal.

    Args:
      query_segments: `[B, Q]` int32, 0 = padding; a token of segment -n reads segment n, which
        does not see it.
      query_slots: `[B, Q]` int32, place of each query in the row.
      segments, context, slots: the same for the keys, `[B, K]` int32, bool and int32. Keys of the
        segment PREFIX are seen by everyone.

    Returns:
      `[B, 1, Q, K]` bool. A padding query sees no token (its attention becomes uniform, and nobody
      reads it), padding keys are seen by nobody.
    """
    same = (abs(query_segments)[:, :, None] == segments[:, None, :]) & (segments[:, None, :] > 0)
    earlier = slots[:, None, :] <= query_slots[:, :, None]
    prefix = segments[:, None, :] == PREFIX
    return ((same & (context[:, None, :] | earlier)) | prefix)[:, None]


def empty_cache(
    shape: tuple[int, int, int, int, int], dtype: DTypeLike, prefix: Array | None = None
) -> Cache:
    """A cache without tokens, or begun by a prefix.

    Args:
      shape: (L, B, length, heads, head_dim), heads of keys and values, and tokens of each row.
      dtype: of keys and values.
      prefix: keys and values `[L, 2, P, heads, head_dim]` that every token of every row sees.

    Returns:
      key, value: `[L, B, P + length, heads, head_dim]`, keys stored after rotation; segments and
      context: `[B, P + length]` int32 and bool of each slot; length: `[B]` int32, the row's first
      free slot.
    """
    depth, batch, length, *heads = shape
    start = 0 if prefix is None else prefix.shape[2]
    whole = (depth, batch, start + length, *heads)
    memory = {name: jnp.zeros(whole, dtype) for name in ("key", "value")}
    if prefix is not None:
        memory = {
            name: leaf.at[:, :, :start].set(prefix[:, None, number].astype(dtype))
            for number, (name, leaf) in enumerate(memory.items())
        }
    return memory | {
        "segments": jnp.zeros((batch, start + length), jnp.int32).at[:, :start].set(PREFIX),
        "context": jnp.zeros((batch, start + length), bool),
        "length": jnp.full((batch,), start, jnp.int32),
    }


def extend_cache(cache: Cache, segments: Array, context: Array) -> tuple[Cache, Array]:
    """Enters T new tokens of each row into the cache's book-keeping.

    Args:
      cache: see `empty_cache`.
      segments, context: `[B, T]` of the new tokens. Rows fill independently: padding at the end of
        a row's new tokens takes no room, so that its slots are overwritten later.

    Returns:
      (cache with new segments, context and length, slots `[B, T]` int32 of the new tokens). Slots
      past the cache's end are dropped, never written elsewhere.
    """
    tokens = jnp.arange(segments.shape[1], dtype=jnp.int32)
    slots = cache["length"][:, None] + tokens
    rows = jnp.arange(segments.shape[0])[:, None]
    taken = jnp.where(segments != 0, tokens + 1, 0).max(axis=1)
    book = {
        "segments": cache["segments"].at[rows, slots].set(segments, mode="drop"),
        "context": cache["context"].at[rows, slots].set(context, mode="drop"),
        "length": cache["length"] + taken,
    }
    return cache | book, slots


def store(memory: Array, layer: Array, slots: Array, new: Array) -> tuple[Array, Array]:
    """Writes `new [B, T, H, K]` into `memory [L, B, S, H, K]`; returns it and the layer's part."""
    rows = jnp.arange(new.shape[0])[:, None]
    memory = memory.at[layer, rows, slots].set(new.astype(memory.dtype), mode="drop")
    return memory, jax.lax.dynamic_index_in_dim(memory, layer, keepdims=False)
