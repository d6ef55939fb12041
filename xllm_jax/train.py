"""The training loop of every stage: initial state, one step, fit.

Nothing here knows a modality, a loss or a data set: the Stage names them.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from clu import parameter_overview
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from xllm_jax import build
from xllm_jax.core import checkpoint, find, mesh, optim, rules
from xllm_jax.core.errors import UserError
from xllm_jax.core.log import Log
from xllm_jax.core.stage import Stage
from xllm_jax.data import padding
from xllm_jax.data.pipeline import Pipeline

Loss = Callable[..., tuple[jax.Array, dict[str, Any]]]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("step", "trainable", "frozen", "optimizer"),
    meta_fields=(),
)
@dataclasses.dataclass
class State:
    """What a step changes or reads: micro-batches seen, both parameter halves, AdamW's state."""

    step: jax.Array
    trainable: dict[str, Any]
    frozen: dict[str, Any]
    optimizer: Any


def step(
    state: State, batch: Any, *, loss: Loss, optimizer: optax.GradientTransformation, seed: int
) -> tuple[State, dict[str, jax.Array]]:
    """One micro-batch: gradients of the trainable half only, one optimizer update.

    Args:
      state: donated; the result takes its buffers.
      batch: pytree of global arrays.
      loss: (params, batch, key) -> (scalar, metrics); `metrics['assign']`, when there, holds new
        values for trainable leaves that follow the data rather than a gradient (BatchNorm's running
        statistics).
      optimizer: optax chain.
      seed: of the run; with the step number it gives every random key.

    Returns:
      (new state, scalar metrics with the loss and the gradient norm).
    """
    key = jax.random.fold_in(jax.random.key(seed), state.step)

    def objective(trainable: dict[str, Any]) -> tuple[jax.Array, dict[str, Any]]:
        return loss(rules.join(trainable, state.frozen), batch, key)

    (value, metrics), gradients = jax.value_and_grad(objective, has_aux=True)(state.trainable)
    follows = metrics.pop("assign", {})
    updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.trainable)
    trainable = optax.apply_updates(state.trainable, updates)
    trainable = rules.unflatten(rules.flatten(trainable) | follows)
    metrics |= {"loss": value, "gradient_norm": optax.global_norm(gradients)}
    return State(state.step + 1, trainable, state.frozen, optimizer_state), metrics


def objective(stage: Stage, xllm: Any) -> Loss:
    """The stage's loss with its networks and options filled in."""
    file = find.module("xllm_jax.objectives", stage.objective, "objective")
    return functools.partial(file.loss, xllm, train=True, **stage.options)


def initial_state(stage: Stage, xllm: Any, device_mesh: Mesh) -> tuple[State, Any, Any]:
    """Parameters split by the allow-list, and the optimizer on the trainable half.

    Returns:
      (state, optax chain, learning-rate function of the update number).
    """
    like, optimizer, schedule = abstract_state(stage, xllm, device_mesh)
    dtypes = jax.tree.map(lambda x: x.dtype, rules.join(like.trainable, like.frozen))
    params = build.parameters(stage, xllm, device_mesh, dtypes)
    trainable, frozen = rules.split(stage.trainable, params)
    shardings = jax.tree.map(lambda x: x.sharding, like)
    with jax.set_mesh(device_mesh):
        optimizer_state = jax.jit(optimizer.init, out_shardings=shardings.optimizer)(trainable)
    step = jax.device_put(jnp.zeros((), jnp.int32), shardings.step)
    return State(step, trainable, frozen, optimizer_state), optimizer, schedule


def abstract_state(stage: Stage, xllm: Any, device_mesh: Mesh) -> tuple[State, Any, Any]:
    """Shapes, dtypes and shardings of a stage's state, without allocating anything.

    Returns:
      (State of `jax.ShapeDtypeStruct`, optax chain, learning-rate function of the update number).
    """
    tree = build.shapes(xllm)
    rules.split(stage.trainable, tree)  # a pattern that matches nothing fails before any work
    dtypes = {
        path: jnp.dtype(jnp.float32 if trains else stage.frozen)
        for path, trains in _trains(stage, tree).items()
    }
    like = build.abstract_parameters(stage, xllm, device_mesh, rules.unflatten(dtypes))
    trainable, frozen = rules.split(stage.trainable, rules.unflatten(like))
    optimizer, schedule = optim.make(stage.optimizer, trainable, total_steps=stage.steps)
    whole = NamedSharding(device_mesh, PartitionSpec())
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    state = optim.abstract_state(optimizer, trainable, whole)
    return State(step, trainable, frozen, state), optimizer, schedule


def jitted(stage: Stage, xllm: Any, optimizer: optax.GradientTransformation, like: State) -> Any:
    """The step as it runs on devices: the state is donated and keeps the shardings of `like`."""
    call = functools.partial(
        step, loss=objective(stage, xllm), optimizer=optimizer, seed=stage.seed
    )
    shardings = jax.tree.map(lambda x: x.sharding, like)
    return jax.jit(call, donate_argnums=0, out_shardings=(shardings, None))


def _trains(stage: Stage, tree: Mapping[str, Any]) -> dict[str, bool]:
    chosen = rules.flatten(rules.split(stage.trainable, tree)[0])
    return {path: path in chosen for path in rules.flatten(tree)}


def fit(stage: Stage, workdir: str | Path, stop_after: int | None = None) -> Path:
    """Trains a stage from its start or from its last checkpoint, and writes the result.

    Args:
      stage: what to do.
      workdir: the run's folder; a second call with the same stage continues where it stopped.
      stop_after: save and return after this many micro-batches (for tests of resuming).

    Returns:
      The folder of the trained parts, `workdir/final`.
    """
    workdir = Path(workdir)
    device_mesh = mesh.make(stage.mesh)
    xllm = build.model(stage)
    state, optimizer, schedule = initial_state(stage, xllm, device_mesh)
    describe(state)
    base = {part: checkpoint.identity(tree) for part, tree in state.frozen.items()}
    pipeline = Pipeline(
        stage.data,
        stage.seed,
        jax.process_index(),
        jax.process_count(),
        quarantine=workdir / "quarantine.jsonl",
    )
    checkpoints = checkpoint.Checkpoints(workdir, stage.keep)
    state, position = resume(state, checkpoints, base)
    batches = pipeline.iterate(position)
    total = stage.steps * stage.optimizer.accumulation
    compiled = jitted(stage, xllm, optimizer, state)
    log = Log(workdir, stage.name, total, int(state.step), jax.process_index() == 0)
    with jax.set_mesh(device_mesh):
        state = run(
            compiled,
            state,
            batches,
            stage,
            device_mesh,
            schedule,
            checkpoints,
            log,
            base,
            min(total, stop_after or total),
        )
    log.close()
    checkpoints.close()
    if int(state.step) == total:
        write_result(stage, state, base, workdir / "final")
    return workdir / "final"


def run(
    compiled: Callable[..., Any],
    state: State,
    batches: Iterator[Any],
    stage: Stage,
    device_mesh: Mesh,
    schedule: Callable[[int], Any],
    checkpoints: checkpoint.Checkpoints,
    log: Log,
    base: Mapping[str, str],
    until: int,
) -> State:
    """Steps until micro-batch `until`; between two log lines nothing waits for the device."""
    pending, samples, waited, since = [], 0, 0.0, time.monotonic()
    number, watch = int(state.step), padding.Watch(min(padding.ENOUGH, until))
    while number < until:
        asked = time.monotonic()
        batch, info = next(batches)
        waited += time.monotonic() - asked
        state, metrics = compiled(state, mesh.to_global(device_mesh, batch))
        number += 1
        pending.append(metrics)
        samples += info["examples"]
        log.say(watch.add(info["padding"]))
        if number % stage.log_every == 0 or number == until:
            scalars = means(pending)  # waits for the steps, so that the clock tells the truth
            seconds = time.monotonic() - since
            update = (number - 1) // stage.optimizer.accumulation
            scalars |= {
                "learning_rate": float(schedule(update)),
                "samples_per_second": samples / seconds,
                "input_wait": waited / seconds,
                "bad_records": info["bad"],
            }
            log.write(number, scalars)
            pending, samples, waited, since = [], 0, 0.0, time.monotonic()
        if number % stage.save_every == 0 or number == until:
            save(checkpoints, number, state, batches, stage, base)
    checkpoints.wait()
    return state


def means(pending: list[dict[str, jax.Array]]) -> dict[str, float]:
    """Means over the pending steps, fetched in one transfer."""
    values = jax.device_get(pending)
    return {name: float(np.mean([v[name] for v in values])) for name in values[0]}


def save(
    checkpoints: checkpoint.Checkpoints,
    number: int,
    state: State,
    batches: Any,
    stage: Stage,
    base: Mapping[str, str],
) -> None:
    """Saves the trainable half, the optimizer, the data position, the stage and the base's hash."""
    arrays = {"step": state.step, "trainable": state.trainable, "optimizer": state.optimizer}
    about = {
        "data": batches.position(),
        "stage": dataclasses.asdict(stage),
        "base": dict(base),
    }
    checkpoints.save(number, arrays, about)


def resume(
    state: State, checkpoints: checkpoint.Checkpoints, base: Mapping[str, str]
) -> tuple[State, Any]:
    """Loads the newest checkpoint, if there is one.

    Returns:
      (state, data position or None).

    Raises:
      UserError: the checkpoint belongs to another frozen base; names the part.
    """
    latest = checkpoints.latest()
    if latest is None:
        return state, None
    about = checkpoints.about(latest)
    for part in sorted(base.keys() | about["base"].keys()):
        if base.get(part) != about["base"].get(part):
            raise UserError(
                f"the checkpoint was trained on another {part} (frozen parameters differ)",
                field=str(checkpoints.directory),
                mend=f"Give init.{part} the base it was trained on, or choose a new --workdir",
            )
    like = {"step": state.step, "trainable": state.trainable, "optimizer": state.optimizer}
    arrays = checkpoints.restore(latest, like)
    print(f"Resumes at micro-batch {latest}", flush=True)
    return (
        State(arrays["step"], arrays["trainable"], state.frozen, arrays["optimizer"]),
        about["data"],
    )


def write_result(stage: Stage, state: State, base: Mapping[str, str], directory: Path) -> None:
    """Writes every part that trained, whole, as a base that later stages can name."""
    params = rules.join(state.trainable, state.frozen)
    trained = {part: params[part] for part in state.trainable}
    about = {"stage": dataclasses.asdict(stage), "base": dict(base)}
    checkpoint.save_base(directory, trained, about)


def describe(state: State) -> None:
    """Prints what trains, leaf by leaf, and how much is frozen."""
    if jax.process_index():
        return
    print("What trains:")
    print(parameter_overview.get_parameter_overview(state.trainable, include_stats="sharding"))
    frozen = sum(leaf.size for leaf in jax.tree.leaves(state.frozen))
    trains = sum(leaf.size for leaf in jax.tree.leaves(state.trainable))
    print(f"{trains:,} parameters train, {frozen:,} are frozen", flush=True)
