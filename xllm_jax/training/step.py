"""One training step of every stage, and the state that it changes.

Nothing here knows a modality, a loss or a data set: the Stage names them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
import optax

from xllm_jax.core import prng, rules
from xllm_jax.core.batch import B
from xllm_jax.core.stage import Divergence
from xllm_jax.core.types import Metrics, Params
from xllm_jax.training import divergence

Loss = Callable[[Params, B, jax.Array | None], tuple[jax.Array, Metrics]]
"""(params, batch, key) -> (scalar, metrics); without a key nothing is drawn at random."""


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
    optimizer: optax.GradientTransformation,
    policy: Divergence,
    seed: int,
) -> tuple[TrainState, Metrics]:
    """One micro-batch: gradients of the trainable half only, one optimizer update.

    Args:
      state: donated; the result takes its buffers.
      batch: global arrays.
      loss: (params, batch, key) -> (scalar, metrics); `metrics['assign']`, when there, holds new
        values for trainable leaves that follow the data rather than a gradient (BatchNorm's running
        statistics).
      optimizer: optax chain.
      policy: what happens to an update that is not finite or leaps.
      seed: of the run; with the step number it gives every random key.

    Returns:
      (new state, metrics: scalars or `WeightedMean`, with the loss and the gradient norms).
    """
    key = step_key(seed, state.step)

    def objective(trainable: Params) -> tuple[jax.Array, Metrics]:
        return loss(rules.join(trainable, state.frozen), batch, key)

    (value, metrics), gradients = jax.value_and_grad(objective, has_aux=True)(state.trainable)
    follows = metrics.pop("assign", {})
    metrics |= {"loss": value} | gradient_norms(gradients)
    verdict = divergence.judge(policy, state.guard, value, metrics["gradient_norm"])
    updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.trainable)
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


def step_key(seed: int, number: int | jax.Array) -> jax.Array:
    """The random key of a run's micro-step, counted from 0."""
    return jax.random.fold_in(prng.key(seed), number)


def gradient_norms(gradients: Params) -> dict[str, jax.Array]:
    """Euclidean norms: `gradient_norm` of everything, `gradient_norm/PART` of each part."""
    norms = {f"gradient_norm/{part}": optax.tree.norm(tree) for part, tree in gradients.items()}
    return norms | {"gradient_norm": optax.tree.norm(gradients)}
