"""Whether one set of answers is better than another to the same samples.

The difference with its interval (`measure.difference`), and approximate randomization (Noreen 1989;
for such scores Riezler and Maxwell 2005): how often is a difference as large when for every sample
a coin decides whose answer is whose?
"""

from __future__ import annotations

from typing import Any

import numpy as np

from xllm_jax.evaluation import measure
from xllm_jax.evaluation.scorers import Score

ROUNDS = 10_000
AT_ONCE = 500  # rounds, which bounds the memory


def compared(first: Score, second: Score, seed: int = 0) -> dict[str, Any]:
    """How much better the second answers are.

    Args:
      first, second: one metric of the same samples in the same order.
      seed: of the coins.

    Returns:
      {'value', 'low', 'high', 'samples'} of the difference, positive where the second are better,
      and 'p', the two-sided probability of one as large by chance alone.
    """
    return measure.difference(first, second) | {"p": probability(first, second, seed)}


def probability(first: Score, second: Score, seed: int = 0, rounds: int = ROUNDS) -> float:
    """The two-sided p of approximate randomization, never 0; arguments as of `compared`."""
    before, after = first.sums, second.sums
    total = before.sum(0) + after.sum(0)
    found = abs(float(second.value(after.sum(0))) - float(first.value(before.sum(0))))
    generator, larger, left = np.random.default_rng(seed), 0, rounds
    while left:
        size = min(left, AT_ONCE)
        swap = generator.integers(0, 2, (size, len(before))).astype(np.float64)
        one = before.sum(0) + swap @ (after - before)
        differences = np.abs(second.value(total - one) - first.value(one))
        # As large up to rounding: sums of the same numbers in another order.
        larger += int((differences >= found - 1e-9 * max(found, 1e-3)).sum())
        left -= size
    return (larger + 1) / (rounds + 1)
