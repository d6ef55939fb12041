"""From noise to latents along a scheduler's table, with classifier-free guidance.

Guidance (arXiv 2207.12598) asks the network twice, with and without the condition, in one batched
call, and goes beyond the difference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from xllm_jax.models.outputs.schedulers import Calls, Table

Array = jax.Array
Denoise = Callable[[Array, Array], Array]
"""(latents `[batch, ...]`, time `[batch]`) to the network's output `[batch, ...]`."""
Network = Callable[[Array, Array, Array], Array]
"""The same with conditions `[batch, tokens, width]` behind."""


class Way(NamedTuple):
    """Where a drawing stands between two calls.

    Attributes:
      latents: `[batch, ...]` float32; start: those that it began with.
      earlier: `[3, batch, ...]` float32, k of the calls before, see `schedulers.Calls`.
    """

    latents: Array
    start: Array
    earlier: Array


def begin(table: Table, noise: Array) -> Way:
    """The way's beginning; arguments as of `draw`."""
    start: Array = noise.astype(jnp.float32) * table.start
    past = table.calls.past.shape[-1]
    return Way(start, start, jnp.zeros((past, *start.shape), jnp.float32))


def call(way: Way, row: Any, limit: Array | np.ndarray, denoise: Denoise) -> tuple[Way, Array]:
    """One call of the network.

    Args:
      way: before it.
      row: of `table.calls`, whose columns are traced here.
      limit: of the table.
      denoise: the network.

    Returns:
      (the way behind it; the network's output `[batch, ...]` float32).
    """
    x = way.latents
    time = jnp.full(x.shape[:1], row.time)
    output = denoise(x * row.scale, time).astype(jnp.float32)
    x = jnp.where(row.restart, way.start, x)
    kept = row.kept_sample * x + row.kept_output * output
    kept = jnp.clip(kept, -limit, limit)
    past = jnp.tensordot(row.past, way.earlier, axes=1, precision=jax.lax.Precision.HIGHEST)
    x = row.sample * x + row.output * output + row.now * kept + past
    joined = jnp.concatenate([kept[None], way.earlier[:-1]])
    return Way(x, way.start, jnp.where(row.store, joined, way.earlier)), output


def draw(
    table: Table, denoise: Denoise, noise: Array, trace: bool = False
) -> tuple[Array, tuple[Array, Array] | None]:
    """Goes a scheduler's way under `lax.scan`; the table may be an argument of a compiled program.

    Args:
      table: of a scheduler.
      denoise: the network.
      noise: `[batch, ...]` of variance 1.
      trace: whether every call's results are wanted.

    Returns:
      latents like `noise`, float32; of every call (output, next latents), `[calls, batch, ...]`.
    """
    table = jax.tree.map(jnp.asarray, table)

    def one(way: Way, row: Calls) -> tuple[Way, tuple[Array, Array] | None]:
        way, output = call(way, row, table.limit, denoise)
        return way, ((output, way.latents) if trace else None)

    way, traced = jax.lax.scan(one, begin(table, noise), table.calls)
    return way.latents, traced


def guided(
    network: Network, conditions: Array, without: Array, scale: Array | float, rescale: float = 0.0
) -> Denoise:
    """The network with guidance.

    Args:
      network: called once with twice the batch.
      conditions: `[batch, tokens, width]`.
      without: `[tokens, width]`, of an empty or an unwanted text; or one for each of the batch.
      scale: how far to go, `[]`; 1 is the condition alone, more exaggerates.
      rescale: as of `combined`.
    """
    without = jnp.broadcast_to(without, conditions.shape)
    both = jnp.concatenate([without.astype(conditions.dtype), conditions])

    def denoise(x: Array, time: Array) -> Array:
        output = network(jnp.concatenate([x, x]), jnp.concatenate([time, time]), both)
        return combined(output[: len(x)], output[len(x) :], scale, rescale)

    return denoise


def combined(without: Array, given: Array, scale: Array | float, rescale: float = 0.0) -> Array:
    """What guidance makes of two outputs.

    Args:
      without, given: outputs without and with the condition, `[batch, ...]`.
      scale: as of `guided`.
      rescale: share of the result that has the spread of `given` (arXiv 2305.08891, section 3.4).

    Returns:
      `[batch, ...]`.
    """
    found = without + scale * (given - without)
    if not rescale:
        return found
    axes = tuple(range(1, found.ndim))
    spread = jnp.std(given, axes, ddof=1, keepdims=True)
    again = found * (spread / jnp.std(found, axes, ddof=1, keepdims=True))
    return rescale * again + (1 - rescale) * found
