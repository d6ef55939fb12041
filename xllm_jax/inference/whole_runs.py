"""Decoding writes whole runs of signal tokens: what else could follow is not permitted."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def permitted(
    logits: Array,
    last: Array,
    step: Array | int,
    signals: Sequence[tuple[int, ...]],
    most: Array | np.ndarray | int,
    before: Array | int = -1,
) -> Array:
    """Scores with -inf for what would leave a run incomplete, or begin it in its midst.

    Behind the first token of a run only the next one is permitted, up to its end; the first one
    only where the answer has room for all of them.

    Args:
      logits: `[..., V]`.
      last: `[...]` int32, the token before; -1 at the start.
      step: number of the token that is chosen, from 0; one of all rows, or `[...]`.
      signals: (id of the first, tokens of a run[, id of what stands between them]) of each kind;
        none permits everything.
      most: tokens of an answer; of all rows, or `[...]`.
      before: `[...]` int32, the token before the last one; -1 where there is none.
    """
    if not signals:
        return logits
    token, banned = jnp.arange(logits.shape[-1]), jnp.zeros(logits.shape, bool)
    kinds = [(first, count, *(*between, -1)[:1]) for first, count, *between in signals]
    for first, count, between in kinds:
        length = count if between < 0 else 2 * count - 1
        banned |= (token > first) & (token < first + count)
        banned |= (token == first) & jnp.asarray(step + length > most)[..., None]
    for first, count, between in kinds:
        inside = _inside(last, first, count)
        wanted = last + 1 if between < 0 else jnp.full_like(last, between)
        if between >= 0:
            parted = (last == between) & _inside(before, first, count)
            wanted = jnp.where(parted, before + 1, wanted)
            inside |= parted
        banned = jnp.where(inside[..., None], token != wanted[..., None], banned)
    return jnp.where(banned, -jnp.inf, logits)


def _inside(last: Array | int, first: int, count: int) -> Array:
    """Where a run has begun and not ended."""
    last = jnp.asarray(last)
    return (last >= first) & (last < first + count - 1)
