"""Decoding writes whole runs of signal tokens: what else could follow is not permitted."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

Array = jax.Array


def permitted(
    logits: Array, last: Array, step: Array | int, signals: Sequence[tuple[int, int]], most: int
) -> Array:
    """Scores with -inf for what would leave a run incomplete, or begin it in its midst.

    Behind the first token of a run only the next one is permitted, up to its end; the first one
    only where the answer has room for all of them.

    Args:
      logits: `[..., V]`.
      last: `[...]` int32, the token before; -1 at the start.
      step: number of the token that is chosen, from 0.
      signals: (id of the first, tokens of a run) of each kind; none permits everything.
      most: tokens of an answer.
    """
    if not signals:
        return logits
    token, banned = jnp.arange(logits.shape[-1]), jnp.zeros(logits.shape, bool)
    for first, count in signals:
        banned |= (token > first) & (token < first + count)
        banned |= (token == first) & (step + count > most)
    for first, count in signals:
        inside = ((last >= first) & (last < first + count - 1))[..., None]
        banned = jnp.where(inside, token != last[..., None] + 1, banned)
    return jnp.where(banned, -jnp.inf, logits)
