"""The training loop of every stage: from its start or its last checkpoint to its result."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from clu import parameter_overview
from jax.sharding import Mesh

from xllm_jax import build, train
from xllm_jax.cache import check
from xllm_jax.core import checkpoint, mesh, rules
from xllm_jax.core.errors import UserError
from xllm_jax.core.log import Log
from xllm_jax.core.stage import Stage
from xllm_jax.data import padding
from xllm_jax.data.pipeline import Batches, Pipeline
from xllm_jax.train import State


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
    cached = check.verified(stage, xllm, device_mesh)
    state, optimizer, schedule = train.initial_state(stage, xllm, device_mesh)
    describe(state)
    base = check.base(state.frozen, cached)
    checkpoints = checkpoint.Checkpoints(workdir, stage.keep)
    state, position = resume(state, checkpoints, base)
    batches = open_batches(stage, workdir, position)
    total = stage.steps * stage.optimizer.accumulation
    log = Log(workdir, stage.name, total, int(state.step), jax.process_index() == 0)
    compiled = train.jitted(stage, xllm, optimizer, state)
    loop = Loop(stage, device_mesh, compiled, schedule, checkpoints, log, base)
    with jax.set_mesh(device_mesh):
        state = loop.run(state, batches, min(total, stop_after or total))
    log.close()
    checkpoints.close()
    if int(state.step) == total:
        params = rules.join(state.trainable, state.frozen)
        trained = {part: params[part] for part in state.trainable}
        trained = check.completed(stage, xllm, device_mesh, trained, cached)
        write_result(stage, trained, base, workdir / "final")
    return workdir / "final"


def open_batches(stage: Stage, workdir: Path, position: Mapping[str, Any] | None) -> Batches:
    """This host's batches from a position on; its bad records go to the run's folder."""
    host, hosts = jax.process_index(), jax.process_count()
    quarantine = workdir / "quarantine.jsonl"
    pipeline = Pipeline(stage.data, stage.seed, host, hosts, quarantine=quarantine)
    return pipeline.iterate(position)


@dataclasses.dataclass
class Loop:
    """What a run needs beside its state and its data.

    Attributes:
      stage: what is trained.
      mesh: of the devices.
      compiled: (state, global batch) -> (state, metrics), the state donated.
      schedule: learning rate of an update's number.
      checkpoints: where the run is saved.
      log: where its scalars go.
      base: {part: identity of its frozen parameters}.
    """

    stage: Stage
    mesh: Mesh
    compiled: Callable[..., Any]
    schedule: Callable[[int], Any]
    checkpoints: checkpoint.Checkpoints
    log: Log
    base: Mapping[str, str]

    def run(self, state: State, batches: Batches, until: int) -> State:
        """Steps until micro-batch `until`; between two log lines nothing waits for the device."""
        number, since = int(state.step), Interval()
        watch = padding.Watch(min(padding.ENOUGH, until))
        while number < until:
            asked = time.monotonic()
            batch, info = next(batches)
            since.waited += time.monotonic() - asked
            state, metrics = self.compiled(state, mesh.to_global(self.mesh, batch))
            number += 1
            since.add(metrics, info)
            self.log.say(watch.add(info["padding"]))
            if number % self.stage.log_every == 0 or number == until:
                self.log.write(number, since.scalars() | self.rates(number, info))
                since = Interval()
            if number % self.stage.save_every == 0 or number == until:
                self.save(number, state, batches)
        self.checkpoints.wait()
        return state

    def rates(self, number: int, info: Mapping[str, Any]) -> dict[str, float]:
        """Scalars that are known without the device."""
        update = (number - 1) // self.stage.optimizer.accumulation
        return {"learning_rate": float(self.schedule(update)), "bad_records": info["bad"]}

    def save(self, number: int, state: State, batches: Batches) -> None:
        """Saves what trains, the optimizer, the data position, the stage and the base's hash."""
        arrays = {"step": state.step, "trainable": state.trainable, "optimizer": state.optimizer}
        about = {
            "data": batches.position(),
            "stage": dataclasses.asdict(self.stage),
            "base": dict(self.base),
        }
        self.checkpoints.save(number, arrays, about)


class Interval:
    """What happened since the last log line."""

    def __init__(self):
        self.pending: list[dict[str, jax.Array]] = []
        self.samples, self.waited, self.since = 0, 0.0, time.monotonic()

    def add(self, metrics: dict[str, jax.Array], info: Mapping[str, Any]) -> None:
        """Notes one step."""
        self.pending.append(metrics)
        self.samples += info["examples"]

    def scalars(self) -> dict[str, float]:
        """Means over the steps, and speeds; waits for the steps: the clock tells the truth."""
        scalars = means(self.pending)
        seconds = time.monotonic() - self.since
        return scalars | {
            "samples_per_second": self.samples / seconds,
            "input_wait": self.waited / seconds,
        }


def means(pending: list[dict[str, jax.Array]]) -> dict[str, float]:
    """Means over the pending steps, fetched in one transfer."""
    values = jax.device_get(pending)
    return {name: float(np.mean([v[name] for v in values])) for name in values[0]}


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


def write_result(
    stage: Stage, trained: Mapping[str, Any], base: Mapping[str, str], directory: Path
) -> None:
    """Writes every part that trained, whole, as a base that later stages can name."""
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
