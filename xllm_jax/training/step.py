"""What every stage trains with: the initial state and one step, which `loop.py` repeats.

Nothing here knows a modality, a loss or a data set: the Stage names them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from xllm_jax.assembly import networks, parameters
from xllm_jax.core import lookup, mesh, optim, prng, rules
from xllm_jax.core.stage import Divergence, Stage
from xllm_jax.training import divergence

Loss = Callable[..., tuple[jax.Array, dict[str, Any]]]


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
    trainable: dict[str, Any]
    frozen: dict[str, Any]
    optimizer: Any
    guard: divergence.Guard


def train_step(
    state: TrainState,
    batch: Any,
    *,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    policy: Divergence,
    seed: int,
) -> tuple[TrainState, dict[str, Any]]:
    """One micro-batch: gradients of the trainable half only, one optimizer update.

    Args:
      state: donated; the result takes its buffers.
      batch: pytree of global arrays.
      loss: (params, batch, key) -> (scalar, metrics); `metrics['assign']`, when there, holds new
        values for trainable leaves that follow the data rather than a gradient (BatchNorm's running
        statistics).
      optimizer: optax chain.
      policy: what happens to an update that is not finite or leaps.
      seed: of the run; with the step number it gives every random key.

    Returns:
      (new state, metrics: scalars or `Tally`, with the loss and the gradient norms).
    """
    key = step_key(seed, state.step)

    def objective(trainable: dict[str, Any]) -> tuple[jax.Array, dict[str, Any]]:
        return loss(rules.join(trainable, state.frozen), batch, key)

    (value, metrics), gradients = jax.value_and_grad(objective, has_aux=True)(state.trainable)
    follows = metrics.pop("assign", {})
    metrics |= {"loss": value} | gradient_norms(gradients)
    verdict = divergence.judge(policy, state.guard, value, metrics["gradient_norm"])
    updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.trainable)
    trainable = optax.apply_updates(state.trainable, updates)
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


def gradient_norms(gradients: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Euclidean norms: `gradient_norm` of everything, `gradient_norm/PART` of each part."""
    norms = {f"gradient_norm/{part}": optax.tree.norm(tree) for part, tree in gradients.items()}
    return norms | {"gradient_norm": optax.tree.norm(gradients)}


def stage_objective(stage: Stage, xllm: Any, train: bool = True) -> Loss:
    """The stage's loss with its networks and options filled in; `train` is for dropout and such."""
    file = lookup.module("xllm_jax.objectives", stage.objective, "objective")
    loss = functools.partial(file.loss, xllm, train=train, **stage.options)
    if not stage.offload:
        return loss
    return lambda params, batch, key: loss(parameters.resident(stage, params), batch, key)


def initial_state(stage: Stage, xllm: Any, device_mesh: Mesh) -> tuple[TrainState, Any, Any]:
    """Parameters split by the allow-list, and the optimizer on the trainable half.

    Returns:
      (state, optax chain, learning-rate function of the update number).
    """
    like, optimizer, schedule = abstract_state(stage, xllm, device_mesh)
    dtypes = jax.tree.map(lambda x: x.dtype, rules.join(like.trainable, like.frozen))
    params = parameters.parameters(stage, xllm, device_mesh, dtypes)
    trainable, frozen = rules.split(stage.trainable, params)
    shardings = jax.tree.map(lambda x: x.sharding, like)
    with jax.set_mesh(device_mesh):
        optimizer_state = jax.jit(optimizer.init, out_shardings=shardings.optimizer)(trainable)
    step = jax.device_put(jnp.zeros((), jnp.int32), shardings.step)
    guard = jax.device_put(divergence.initial_guard(stage.divergence), shardings.guard)
    return TrainState(step, trainable, frozen, optimizer_state, guard), optimizer, schedule


def abstract_state(stage: Stage, xllm: Any, device_mesh: Mesh) -> tuple[TrainState, Any, Any]:
    """Shapes, dtypes and shardings of a stage's state, without allocating anything.

    Returns:
      (TrainState of `jax.ShapeDtypeStruct`, optax chain, learning-rate function of the update
      number).
    """
    divergence.check(stage.divergence)
    tree = networks.shapes(xllm)
    rules.split(stage.trainable, tree)  # a pattern that matches nothing fails before any work
    dtypes = {
        path: jnp.dtype(jnp.float32 if trains else stage.frozen)
        for path, trains in _trains(stage, tree).items()
    }
    like = parameters.abstract_parameters(stage, xllm, device_mesh, rules.unflatten(dtypes))
    trainable, frozen = rules.split(stage.trainable, rules.unflatten(like))
    optimizer, schedule = optim.make(stage.optimizer, trainable, total_steps=stage.steps)
    whole = NamedSharding(device_mesh, PartitionSpec())
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    state = optim.abstract_state(optimizer, trainable, whole)
    guard = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole),
        jax.eval_shape(lambda: divergence.initial_guard(stage.divergence)),
    )
    return TrainState(step, trainable, frozen, state, guard), optimizer, schedule


def jit_train_step(
    stage: Stage, xllm: Any, optimizer: optax.GradientTransformation, like: TrainState
) -> Any:
    """The step as it runs on devices: the state is donated and keeps the shardings of `like`."""
    call = functools.partial(
        train_step,
        loss=stage_objective(stage, xllm),
        optimizer=optimizer,
        policy=stage.divergence,
        seed=stage.seed,
    )
    shardings = jax.tree.map(lambda x: x.sharding, like)
    options = stage.compiler.get(mesh.platform(like.step.sharding.mesh)) or None
    return jax.jit(
        call, donate_argnums=0, out_shardings=(shardings, None), compiler_options=options
    )


def _trains(stage: Stage, tree: Mapping[str, Any]) -> dict[str, bool]:
    chosen = rules.flatten(rules.split(stage.trainable, tree)[0])
    return {path: path in chosen for path in rules.flatten(tree)}
