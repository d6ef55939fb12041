"""The training loop of every stage: from its start or its last checkpoint to its result."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from clu import parameter_overview
from jax.sharding import Mesh

from xllm_jax import build, divergence, telemetry, train
from xllm_jax.cache import check
from xllm_jax.core import checkpoint, mesh, rules
from xllm_jax.core.errors import Diverged, UserError
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

    Raises:
      UserError: the stage, its data or what lies in `workdir` do not fit together.
      Diverged: the stage's policy stops the run; the state before it is saved.
    """
    workdir = Path(workdir)
    profile = telemetry.Profile(stage.profile, workdir / "profile")
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
    main = jax.process_index() == 0
    log = Log(workdir, stage.name, total, int(state.step), main, stage.wandb)
    compiled = train.jitted(stage, xllm, optimizer, state)
    watched = telemetry.Compilations(compiled, telemetry.programs(stage), log.say)
    held, loss = divergence.Held(stage, workdir), train.objective(stage, xllm)
    loop = Loop(stage, device_mesh, watched, schedule, checkpoints, log, base, profile, held, loss)
    try:
        with jax.set_mesh(device_mesh), watched:
            state = loop.run(state, batches, min(total, stop_after or total))
    finally:
        profile.close()
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
      profile: which micro-batches are traced.
      held: the micro-batches since the last look.
      loss: the stage's loss, to count the work it needs.
    """

    stage: Stage
    mesh: Mesh
    compiled: telemetry.Compilations
    schedule: Callable[[int], Any]
    checkpoints: checkpoint.Checkpoints
    log: Log
    base: Mapping[str, str]
    profile: telemetry.Profile
    held: divergence.Held
    loss: train.Loss

    def run(self, state: State, batches: Batches, until: int) -> State:
        """Steps until micro-batch `until`; between two log lines nothing waits for the device."""
        number, since = int(state.step), self.interval()
        watch = padding.Watch(min(padding.ENOUGH, until))
        while number < until:
            asked, position = time.monotonic(), batches.position()
            batch, info = next(batches)
            since.wait(time.monotonic() - asked)
            number += 1
            self.held.add(divergence.Entry(number, batch, info, position))
            state, metrics = self.step(number, state, batch, since)
            since.add(number, metrics, info)
            self.log.say(watch.add(info["padding"]))
            logs = number % self.stage.log_every == 0 or number == until
            saves = number % self.stage.save_every == 0 or number == until
            if logs or saves or self.held.full:
                self.look(since.fetch(), state)
            if logs:
                self.log.write(number, since.scalars() | self.rates(number, info))
                since = self.interval()
            if saves:
                self.save(number, state, batches.position())
        self.checkpoints.wait()
        return state

    def interval(self) -> telemetry.Interval:
        """A new one; it counts useful work where the peak of every device is known."""
        peak = telemetry.peak(self.mesh.devices.flatten())
        return telemetry.Interval(self.useful if peak else None, peak)

    @functools.cached_property
    def useful(self) -> Callable[[Any, Any], float]:
        """(state, batch) -> FLOPs that the step cannot do without."""
        return telemetry.useful(self.loss)

    def step(self, number: int, state: State, batch: Any, since: telemetry.Interval) -> Any:
        """Micro-batch `number`: (state, metrics), not waited for."""
        batch = mesh.to_global(self.mesh, batch)
        since.work(state, batch)
        self.profile.before(number, state)
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            state, metrics = self.compiled(state, batch)
        self.log.say(self.profile.after(number, state))
        return state, metrics

    def look(self, rows: Mapping[int, Mapping[str, Any]], state: State) -> None:
        """Deals with the micro-batches that the step found wrong, then lets all go.

        Raises:
          Diverged: one of them stops the run. `state` is then the one that it met.
        """
        for entry, stops in self.held.find(rows):
            values = {name: rows[entry.number][name] for name in ("loss", "gradient_norm")}
            if stops:
                state.guard = divergence.reopened(state.guard)
                if self.checkpoints.latest() != entry.number - 1:
                    self.save(entry.number - 1, state, entry.position)
                    self.checkpoints.wait()
            file = self.held.save(entry, values, self.checkpoints.latest())
            line = divergence.wording(entry, values, file)
            if stops:
                raise Diverged(f"The run diverged: {line}")
            self.log.say(f"Skipped: {line}")
        self.held.clear()

    def rates(self, number: int, info: Mapping[str, Any]) -> dict[str, float]:
        """Scalars that are known without the device."""
        update = (number - 1) // self.stage.optimizer.accumulation
        return {
            "learning_rate": float(self.schedule(update)),
            "bad_records": info["bad"],
            "compilations": self.compiled.count,
            **telemetry.memory(),
        }

    def save(self, number: int, state: State, position: Mapping[str, Any]) -> None:
        """Saves what trains, the optimizer, the data position, the stage and the base's hash."""
        arrays = saved_arrays(state)
        about = {
            "data": position,
            "stage": dataclasses.asdict(self.stage),
            "base": dict(self.base),
        }
        self.checkpoints.save(number, arrays, about)


def saved_arrays(state: State) -> dict[str, Any]:
    """What a checkpoint holds of a state: everything but the frozen base."""
    names = ("step", "trainable", "optimizer", "guard")
    return {name: getattr(state, name) for name in names}


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
    arrays = checkpoints.restore(latest, saved_arrays(state))
    print(f"Resumes at micro-batch {latest}", flush=True)
    return State(**arrays, frozen=state.frozen), about["data"]


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
