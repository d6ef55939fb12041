"""A mean that is not divided yet, so that micro-batches are averaged by what they hold."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

Scalar = jax.Array | float


class WeightedMean(NamedTuple):
    """What an objective reports where rows differ in how much they count.

    The mean over several steps is the sum of totals over the sum of counts: a step with three
    tokens of a kind weighs three, a step without any weighs nothing.

    Attributes:
      total: scalar float32, the sum.
      count: scalar float32, how many were summed; 0 = the step has none of them.
    """

    total: Scalar
    count: Scalar

    @property
    def mean(self) -> jax.Array:
        """The quotient, 0 where nothing was summed."""
        return self.total / divisor(self.count)


Terms = dict[str, WeightedMean]
"""{what they are counted in: sum}: the parts of a loss, which is the sum of their means."""


def divisor(count: Scalar) -> jax.Array:
    """What a sum over `count` is divided by: 1 where there is nothing."""
    return jnp.where(jnp.asarray(count) > 0, count, 1.0)
