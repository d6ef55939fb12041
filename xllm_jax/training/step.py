"""One training step of every stage, and the state that it changes.

Nothing here knows a modality, a loss or a data set: the Stage names them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import cast

import jax
import jax.numpy as jnp
import optax
from jax.interpreters import ad

from xllm_jax.core import optim, prng, rules
from xllm_jax.core.batch import B
from xllm_jax.core.stage import Divergence
from xllm_jax.core.types import Metrics, Params
from xllm_jax.core.weighted_mean import WeightedMean
from xllm_jax.training import divergence

Loss = Callable[[Params, B, jax.Array | None], tuple[jax.Array, Metrics]]
"""(params, batch, key) -> (scalar, metrics); without a key nothing is drawn at random."""

Counts = Callable[[B, Metrics], Mapping[str, jax.Array]]
"""(batch, metrics) -> {metric: over how many tokens and the like it is the mean}."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("step", "trainable", "frozen", "optimizer", "guard"),
    meta_fields=(),
)
@dataclasses.dataclass
class TrainState:
    """What a step changes or reads: micro-batches seen, both parameter halves, AdamW's state, and
    what `divergence` remembers."""

    step: jax.Array
    trainable: Params
    frozen: Params
    optimizer: optax.OptState
    guard: divergence.Guard


def train_step(
    state: TrainState,
    batch: B,
    *,
    loss: Loss[B],
    optimizer: optim.Transformation,
    policy: Divergence,
    seed: int,
    counts: Counts[B] | None = None,
) -> tuple[TrainState, Metrics]:
    """One micro-batch: gradients of the trainable half only, one optimizer update.

    Args:
      state: donated; the result takes its buffers.
      batch: global arrays.
      loss: (params, batch, key) -> (scalar, metrics); `metrics['assign']`, when there, holds new
        values for trainable leaves that follow the data rather than a gradient (BatchNorm's running
        statistics).
      optimizer: optax chain; it weighs the terms of the loss, `metrics['terms']`, by their counts.
      policy: what happens to an update that is not finite or leaps.
      seed: of the run; with the step number it gives every random key.
      counts: over how many tokens and the like metrics are means; they are reported with it.

    Returns:
      (new state, metrics: scalars or `WeightedMean`, with the loss, its terms and the gradient
      norms).
    """
    value, metrics, gradients = differentiated(loss, state, batch, step_key(seed, state.step))
    follows = metrics.pop("assign", {})
    total = jax.tree.map(lambda *leaves: sum(leaves[1:], leaves[0]), *gradients)
    metrics |= {"loss": value} | gradient_norms(total)
    verdict = divergence.judge(policy, state.guard, value, metrics["gradient_norm"])
    weights = [jnp.float32(term.count) for term in metrics.get("terms", {}).values()]
    updates, optimizer_state = optimizer.update(
        gradients if len(gradients) > 1 else total,
        *(state.optimizer, state.trainable),
        weights=jnp.stack(weights) if weights else None,
    )
    metrics |= weighted(metrics, counts(batch, metrics) if counts else {})
    trainable = cast(Params, optax.apply_updates(state.trainable, updates))
    trainable = rules.unflatten(rules.flatten(trainable) | follows)
    trainable, optimizer_state = jax.tree.map(
        lambda new, old: jnp.where(verdict.applied, new, old),
        (trainable, optimizer_state),
        (state.trainable, state.optimizer),
    )
    number = state.step + ~verdict.halted
    after = TrainState(number, trainable, state.frozen, optimizer_state, verdict.guard)
    return after, metrics | verdict.metrics


def differentiated(
    loss: Loss[B], state: TrainState, batch: B, key: jax.Array
) -> tuple[jax.Array, Metrics, tuple[Params, ...]]:
    """(loss, metrics, gradients): one tree, or one for each term where the optimizer takes them.

    Args:
      loss, state, batch: see `train_step`.
      key: of this micro-batch.
    """
    split = optim.terms_of(state.optimizer) > 1

    def objective(trainable: Params) -> tuple[tuple[jax.Array, ...], Metrics]:
        value, metrics = loss(rules.join(trainable, state.frozen), batch, key)
        terms = [term.mean for term in metrics["terms"].values()] if split else [value]
        return tuple(terms), metrics

    means, pull, metrics = jax.vjp(objective, state.trainable, has_aux=True)
    # A symbolic zero: a term's backward pass leaves out what only the others need.
    zeros = [ad.Zero(jax.typeof(mean)) for mean in means]
    gradients = tuple(
        pull((*zeros[:place], jnp.ones_like(mean), *zeros[place + 1 :]))[0]
        for place, mean in enumerate(means)
    )
    return sum(means[1:], means[0]), metrics, gradients


def weighted(metrics: Metrics, counts: Mapping[str, jax.Array]) -> Metrics:
    """The metrics that are means, with what they are means over; the loss has its terms."""
    return {
        name: WeightedMean(metrics[name] * count, jnp.float32(count))
        for name, count in counts.items()
        if name in metrics and name != "loss"
    }


def step_key(seed: int, number: int | jax.Array) -> jax.Array:
    """The random key of a run's micro-step, counted from 0."""
    return jax.random.fold_in(prng.key(seed), number)


def gradient_norms(gradients: Params) -> dict[str, jax.Array]:
    """Euclidean norms: `gradient_norm` of everything, `gradient_norm/PART` of each part."""
    norms = {f"gradient_norm/{part}": optax.tree.norm(tree) for part, tree in gradients.items()}
    return norms | {"gradient_norm": optax.tree.norm(gradients)}
