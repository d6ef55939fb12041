"""The next token of rows that are each decoded in their own way.

`decoding.choose` decodes all rows alike and compiles once for every way. Here a row's way is data:
nothing compiles again when another one joins, and a row's token depends on its own scores and
settings alone, not on its place nor on its neighbors.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

ALTERNATIVES = 20  # that are told of each token


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Settings:
    """How each of B rows is decoded.

    Attributes:
      stream: `[B, 2]` uint32, the row's random stream, see `stream_of`.
      temperature: `[B]` float32; 0 takes the best token.
      top_k: `[B]` int32; 0 is off. top_p: `[B]` float32; 1 is off.
      most: `[B]` int32, tokens of the answer at most.
      told: `[B]` bool, whether alternatives are wanted.
    """

    stream: Array | np.ndarray
    temperature: Array | np.ndarray
    top_k: Array | np.ndarray
    top_p: Array | np.ndarray
    most: Array | np.ndarray
    told: Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chosen:
    """What B rows go on with; log-probabilities are the LLM's, before temperature and filters.

    Attributes:
      tokens: `[B]` int32, and `logprobs` `[B]` float32 of them.
      top_tokens, top_logprobs: `[B, A]` the best ones, descending; zeros where no row wants them.
    """

    tokens: Array
    logprobs: Array
    top_tokens: Array
    top_logprobs: Array


def stream_of(seed: int) -> np.ndarray:
    """The random stream of a seed of 64 bits, `[2]` uint32."""
    return np.array([seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF], np.uint32)


def filter_rows(logits: Array, top_k: Array | np.ndarray, top_p: Array | np.ndarray) -> Array:
    """`decoding.filter_logits` with filters of their own for each row, behind the temperature.

    Args:
      logits: `[B, V]` float32.
      top_k, top_p: `[B]`, see `Settings`.
    """
    size = logits.shape[-1]
    ascending = jnp.sort(logits, axis=-1)
    kept = jnp.where(top_k > 0, jnp.minimum(top_k, size), size)[:, None]
    beyond = jnp.arange(size) < size - kept
    shares = jax.nn.softmax(jnp.where(beyond, -jnp.inf, ascending))
    improbable = jnp.cumsum(shares, axis=-1) <= 1.0 - top_p[:, None]
    removed = beyond | (improbable & (top_p < 1.0)[:, None])
    removed = removed.at[:, -1].set(False)
    smallest = jnp.where(removed, jnp.inf, ascending).min(axis=-1, keepdims=True)
    return jnp.where(logits < smallest, -jnp.inf, logits)


def draw_rows(logits: Array, settings: Settings, step: Array) -> Array:
    """Draws a token for each row, from its own stream at its own step: `[B]` int32.

    Args:
      logits: `[B, V]` float32.
      settings: of the rows.
      step: `[B]` int32, number of the token in its answer.
    """
    scaled = logits / jnp.where(settings.temperature > 0, settings.temperature, 1.0)[:, None]
    filtered = jax.lax.cond(
        ((settings.top_k > 0) | (settings.top_p < 1.0)).any(),
        lambda: filter_rows(scaled, settings.top_k, settings.top_p),
        lambda: scaled,
    )

    def draw(stream: Any, step: Array, logits: Array) -> Array:
        key = jax.random.wrap_key_data(stream, impl="threefry2x32")
        return jax.random.categorical(jax.random.fold_in(key, step), logits)

    return jax.vmap(draw)(settings.stream, step, filtered).astype(jnp.int32)


def choose_rows(logits: Array, settings: Settings, step: Array, active: Array) -> Chosen:
    """The next token of each row.

    Args:
      logits: `[B, V]` float32, what is not permitted at -inf.
      settings: of the rows.
      step: `[B]` int32, number of the token in its answer.
      active: `[B]` bool; what the others want costs nothing.
    """
    best = logits.argmax(-1).astype(jnp.int32)
    sampled = settings.temperature > 0
    drawn = jax.lax.cond(
        (sampled & active).any(), lambda: draw_rows(logits, settings, step), lambda: best
    )
    tokens = jnp.where(sampled, drawn, best)
    logprobs = jax.nn.log_softmax(logits)
    count = min(ALTERNATIVES, logits.shape[-1])
    none = jnp.zeros((len(tokens), count), jnp.float32), jnp.zeros((len(tokens), count), jnp.int32)
    top_logprobs, top_tokens = jax.lax.cond(
        (settings.told & active).any(),
        lambda: tuple(jax.lax.top_k(logprobs, count)),
        lambda: none,
    )
    own = jnp.take_along_axis(logprobs, tokens[:, None], axis=1)[:, 0]
    return Chosen(tokens, own, top_tokens, top_logprobs)
