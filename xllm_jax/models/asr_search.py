"""Greedy and beam search of the ASR decoder: one token per CIF embedding."""

from __future__ import annotations

from typing import NamedTuple, cast

import jax
import jax.numpy as jnp

from xllm_jax.core.types import Params
from xllm_jax.models.asr import END, PAD, ASRDecoder, Cache, Context

Array = jax.Array


class Hypotheses(NamedTuple):
    """Results of the search, best first.

    Attributes:
      tokens: `[batch, beams, steps]` int32; PAD behind each row's last step.
      scores: `[batch, beams]` float32, sum of the tokens' log probabilities.
    """

    tokens: Array
    scores: Array


def search(
    decoder: ASRDecoder,
    params: Params,
    embeddings: Array,
    counts: Array,
    beams: int = 1,
    visual: Context | None = None,
    linguistic: Context | None = None,
) -> Hypotheses:
    """Greedy (`beams` 1) or beam search in one compiled loop.

    The number of steps of a row is its number of CIF embeddings; a hypothesis goes on behind END,
    as in the reference, and `cut_at_end` cuts it there.

    Args:
      decoder: the network.
      params: its parameters.
      embeddings: `[batch, steps, width]` CIF embeddings.
      counts: `[batch]` steps of each row.
      beams: hypotheses kept per row.
      visual, linguistic: contexts, as in `ASRDecoder`.

    Returns:
      `Hypotheses`.
    """
    batch, steps, _ = embeddings.shape
    wide = jax.tree.map(lambda x: jnp.repeat(x, beams, axis=0), (embeddings, visual, linguistic))
    embeddings, visual, linguistic = wide

    def advance(state: tuple) -> tuple:
        step, tokens, scores, cache = state
        before = jnp.take(tokens, jnp.maximum(step - 1, 0), axis=2)
        previous = jnp.where(step > 0, before, END).reshape(-1)
        given = (previous, embeddings, cache, step, visual, linguistic)
        made = decoder.apply({"params": params}, *given, method="step")
        logits, cache = cast(tuple[Array, Cache], made)
        chosen, origin, best = extend(logits.reshape(batch, beams, -1), scores)
        runs = (step < counts)[:, None]
        origin = jnp.where(runs, origin, jnp.arange(beams))
        tokens = jnp.take_along_axis(tokens, origin[..., None], axis=1)
        tokens = tokens.at[:, :, step].set(jnp.where(runs, chosen, PAD))
        return step + 1, tokens, jnp.where(runs, best, scores), reorder(cache, origin)

    first = jnp.where(jnp.arange(beams) == 0, 0.0, -jnp.inf)
    state = (
        jnp.int32(0),
        jnp.full((batch, beams, steps), PAD, jnp.int32),
        jnp.broadcast_to(first, (batch, beams)),
        decoder.init_cache(batch * beams, steps),
    )
    limit = jnp.minimum(counts.max(), steps)
    _, tokens, scores, _ = jax.lax.while_loop(lambda s: s[0] < limit, advance, state)
    return Hypotheses(tokens, scores)


def extend(logits: Array, scores: Array) -> tuple[Array, Array, Array]:
    """Best continuations over all beams of a row.

    Args:
      logits: `[batch, beams, vocab]`.
      scores: `[batch, beams]`, -inf for beams that do not exist yet.

    Returns:
      (tokens, beams they continue, scores), each `[batch, beams]`.
    """
    batch, beams, vocab = logits.shape
    total = scores[..., None] + jax.nn.log_softmax(logits, axis=-1)
    best, index = jax.lax.top_k(total.reshape(batch, -1), beams)
    return (index % vocab).astype(jnp.int32), index // vocab, best


def reorder(cache: Cache, origin: Array) -> Cache:
    """Lets every beam continue the keys and values of `origin` `[batch, beams]`."""
    batch, beams = origin.shape
    if beams == 1:
        return cache
    rows = (jnp.arange(batch)[:, None] * beams + origin).reshape(-1)
    return jax.tree.map(lambda x: jnp.take(x, rows, axis=1), cache)


def cut_at_end(tokens: Array, counts: Array) -> tuple[Array, Array]:
    """Cuts hypotheses at their first END.

    Args:
      tokens: `[..., steps]` int32.
      counts: broadcastable to `[...]`, steps of each row.

    Returns:
      (tokens with PAD from END on, lengths without END).
    """
    steps = jnp.arange(tokens.shape[-1])
    stops = (tokens == END) | (steps >= counts[..., None])
    kept = ~(jnp.cumsum(stops, axis=-1) > 0)
    return jnp.where(kept, tokens, PAD), kept.sum(-1, dtype=jnp.int32)
