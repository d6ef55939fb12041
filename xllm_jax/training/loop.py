"""The training loop of every stage: from its start or its last checkpoint to its result."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from xllm_jax.assembly import adapter_source
from xllm_jax.assembly.system import System
from xllm_jax.core import checkpoint, disk, hosts, kept_checkpoints, mesh, watchdog
from xllm_jax.core.batch import Batch
from xllm_jax.core.errors import Diverged, UserError
from xllm_jax.core.log import Log
from xllm_jax.core.optim import Schedule
from xllm_jax.core.stage import Stage
from xllm_jax.core.types import Metrics
from xllm_jax.core.weighted_mean import Terms, WeightedMean
from xllm_jax.data import manifest
from xllm_jax.data.batching import padding
from xllm_jax.data.pipeline import Batches, Pipeline
from xllm_jax.feature_cache import check
from xllm_jax.training import divergence, result, startup, telemetry, validation
from xllm_jax.training.prefetch import Prefetched
from xllm_jax.training.step import Loss, TrainState
from xllm_jax.training.trainer import Trainer


def fit(stage: Stage, workdir: str | Path, stop_after: int | None = None) -> Path:
    """Trains a stage from its start or from its last checkpoint, and writes the result.

    Args:
      stage: what to do.
      workdir: the run's folder; a second call with the same stage continues where it stopped.
      stop_after: save and return after this many micro-batches (for tests of resuming).

    Returns:
      The folder of the trained parts, `workdir/final`.

    Raises:
      UserError: the stage, its data or what lies in `workdir` do not fit together, or another
        process trains there.
      CannotWrite: the disk is full or read-only; says which checkpoint is whole.
      Diverged: the stage's policy stops the run; the state before it is saved.
      Preempted: SIGTERM came, and the run was saved.
    """
    workdir, store = Path(workdir), hosts.store()
    validation.check_settings(stage)
    with (
        watchdog.Watch(workdir, stage.stall, store) as watch,
        disk.told(functools.partial(kept_checkpoints.sentence, workdir)),
        startup.hold(workdir),
    ):
        train(stage, workdir, stop_after, watch, store)
    return workdir / "final"


def train(
    stage: Stage,
    workdir: Path,
    stop_after: int | None,
    watch: watchdog.Watch,
    store: hosts.Store | None,
) -> None:
    """As `fit`, in a folder that is held, under a watch that has begun.

    Args:
      stage, workdir, stop_after: as of `fit`.
      watch: over stalls, other hosts and SIGTERM.
      store: of the hosts; None with one.
    """
    system = System.build(stage)
    trainer, device_mesh = Trainer(system), system.device_mesh
    pipeline = startup.open_pipeline(stage, device_mesh, workdir)
    watch.reading = pipeline.activity.now
    startup.compare(system, pipeline, store)
    cached = check.verified(system)
    state = trainer.initial_state()
    adapter_source.check_alpha(stage, state.trainable, state.frozen)
    startup.describe(state)
    base = check.base(state.frozen, cached)
    hosts.agree(store, "frozen base", base)
    best = stage.best
    older = functools.partial(check.older_base, system, state.frozen, cached.keys())
    with checkpoint.Checkpoints(workdir, stage.keep, best.metric, best.lowest) as checkpoints:
        state, position = startup.resume(state, checkpoints, base, stage.data, store, older)
        loop = assemble(trainer, state, workdir, checkpoints, base, watch)
        loop.evaluation = validation.opened(system, state, workdir, watch, store, loop.log.log)
        batches = open_batches(pipeline, device_mesh, position)
        total = stage.steps * stage.optimizer.accumulation
        with jax.set_mesh(device_mesh):
            state = loop.run(state, batches, device_mesh, min(total, stop_after or total))
    if int(state.step) == total:
        watch.moved("writes the result")
        result.write(system, state, base, cached, workdir / "final")
    elif watch.stopping:
        raise watchdog.Preempted(int(state.step))


def assemble(
    trainer: Trainer,
    state: TrainState,
    workdir: Path,
    checkpoints: checkpoint.Checkpoints,
    base: Mapping[str, str],
    watch: watchdog.Watch,
) -> Loop:
    """The loop of a run, with its log opened.

    Args:
      trainer: what trains.
      state: that the run starts from.
      workdir: the run's folder.
      checkpoints: where the run is saved.
      base: {part: identity of its frozen parameters}.
      watch: over stalls, other hosts and SIGTERM.
    """
    stage = trainer.system.stage
    total, main = stage.steps * stage.optimizer.accumulation, jax.process_index() == 0
    log = Log(workdir, stage.name, total, int(state.step), main, stage.wandb)
    share, _ = mesh.host_share(trainer.system.device_mesh)
    return Loop(
        stage=stage,
        compiled=telemetry.Compilations(trainer.step, telemetry.programs(stage), log.log),
        schedule=trainer.schedule,
        checkpoints=checkpoints,
        log=log,
        base=base,
        watch=watch,
        profile=telemetry.Profile(stage.profile, workdir / "profile"),
        held=divergence.Held(stage, workdir, share),
        loss=trainer.loss,
        store=hosts.store(),
    )


def open_batches(
    pipeline: Pipeline, device_mesh: Mesh, position: Mapping[str, Any] | None
) -> Batches:
    """This host's batches from a position of all hosts on.

    Args:
      pipeline: the data of this host.
      device_mesh: over which the hosts share a batch.
      position: of all hosts, as it was saved; None begins anew.
    """
    return pipeline.iterate(startup.share_of(position, device_mesh))


@dataclasses.dataclass
class Loop:
    """What a run needs in addition to its state and its data.

    Attributes:
      stage: what is trained.
      compiled: (state, global batch) -> (state, metrics), the state donated.
      schedule: learning rate of an update's number.
      checkpoints: where the run is saved.
      log: where its scalars go.
      base: {part: identity of its frozen parameters}.
      watch: over stalls, other hosts and SIGTERM.
      profile: which micro-batches are traced.
      held: the micro-batches since the last look.
      loss: the stage's loss, to count the work it needs.
      store: of the hosts, None with one.
      evaluation: measures held-out data, None without any.
      scores: values of the metric of the best checkpoint since the last one; of held-out data, the
        value of this very state.
    """

    stage: Stage
    compiled: telemetry.Compilations[TrainState, Batch, tuple[TrainState, Metrics]]
    schedule: Schedule
    checkpoints: checkpoint.Checkpoints
    log: Log
    base: Mapping[str, str]
    watch: watchdog.Watch
    profile: telemetry.Profile
    held: divergence.Held
    loss: Loss
    store: hosts.Store | None = None
    evaluation: validation.Evaluation | None = None
    scores: list[jax.Array | WeightedMean | Terms | float] = dataclasses.field(default_factory=list)

    def run(self, state: TrainState, batches: Batches, device_mesh: Mesh, until: int) -> TrainState:
        """Steps until micro-batch `until`, or until all hosts agree to stop after SIGTERM.

        Args:
          state: where the run stands; donated.
          batches: of this host.
          device_mesh: where they go.
          until: number of the last micro-batch.
        """
        placed = Prefetched(batches, functools.partial(mesh.to_global, device_mesh))
        with contextlib.closing(placed), self.compiled:
            try:
                if self.evaluation:
                    self.evaluation.check_best(state)
                return self.steps(state, placed, until)
            finally:
                if self.evaluation:
                    self.evaluation.close()
                self.profile.close()
                self.log.close()

    def steps(self, state: TrainState, batches: Prefetched, until: int) -> TrainState:
        """As `run`; between two log lines nothing waits for the device.

        Args:
          state: where the run stands; donated.
          batches: global, prefetched.
          until: number of the last micro-batch.
        """
        number, since = int(state.step), self.interval()
        hints = padding.hints(self.stage.data)
        saved, waste = number, padding.Watch(min(padding.ENOUGH, until), hints)
        self.watch.start(number)
        while number < until and not self.watch.reached(number):
            asked, position = time.monotonic(), batches.position()
            self.watch.moved(watchdog.INPUT)
            batch, info = next(batches)
            self.watch.moved("runs a step", info["keys"])
            since.wait(time.monotonic() - asked)
            number += 1
            self.held.add(divergence.Entry(number, info["arrays"], info, position))
            state, metrics = self.step(number, state, batch, since)
            since.add(number, metrics, info)
            self.score(metrics)
            self.log.log(waste.add(info["padding"]))
            logs = number % self.stage.log_every == 0 or number == until
            saves = number % self.stage.save_every == 0
            measures = self.evaluation is not None and self.evaluation.due(number)
            if logs or saves or measures or self.held.full:
                self.look(since.fetch(), state)
            scalars = since.scalars() | self.rates(number, info) if logs else {}
            if self.evaluation and measures:
                scalars |= self.measure(self.evaluation, number, state, since)
            if scalars:
                self.checkpoints.check()
                self.log.write(number, scalars)
            since = self.interval() if logs else since
            self.watch.stepped()
            if saves:
                self.save(number, state, batches.position())
                saved = number
        if number > saved:
            self.look(since.fetch(), state)
            self.save(number, state, batches.position())
        self.checkpoints.wait()
        return state

    def interval(self) -> telemetry.Interval:
        """A new one; it counts useful work where the peak of every device is known."""
        peak = telemetry.peak(jax.devices())
        return telemetry.Interval(self.useful if peak else None, peak)

    @functools.cached_property
    def useful(self) -> Callable[[TrainState, Batch], float]:
        """(state, batch) -> FLOPs that the step cannot do without."""
        return telemetry.useful(self.loss)

    def step(
        self, number: int, state: TrainState, batch: Batch, since: telemetry.Interval
    ) -> tuple[TrainState, Metrics]:
        """Runs micro-batch `number`, without waiting for it.

        Args:
          number: counted from 1.
          state: donated.
          batch: global arrays.
          since: the interval that the work counts in.

        Returns:
          (state, metrics).
        """
        since.work(state, batch)
        self.profile.before(number, state)
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            state, metrics = self.compiled(state, batch)
        self.log.log(self.profile.after(number, state))
        return state, metrics

    def look(self, rows: Mapping[int, Metrics], state: TrainState) -> None:
        """Handles the micro-batches that the step found wrong, then forgets all of them.

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
            line = divergence.format_message(entry, values, file)
            if stops:
                raise Diverged(f"The run diverged: {line}")
            self.log.log(f"Skipped: {line}")
        self.held.clear()

    def measure(
        self,
        evaluation: validation.Evaluation,
        number: int,
        state: TrainState,
        since: telemetry.Interval,
    ) -> dict[str, float]:
        """Scalars of the held-out data, in time that does not count as training's.

        Args:
          evaluation: that measures.
          number: of the last micro-batch.
          state: after it.
          since: the interval that the time is left out of.
        """
        jax.block_until_ready(state)
        began = time.monotonic()
        found = evaluation.measure(state)
        self.log.log(evaluation.format_message(number, found))
        since.leave_out(time.monotonic() - began)
        if validation.follows(self.stage) and self.stage.best.metric in found:
            self.scores = [found[self.stage.best.metric]]
        return found

    def rates(self, number: int, info: Mapping[str, Any]) -> dict[str, float]:
        """Scalars that are known without the device."""
        update = (number - 1) // self.stage.optimizer.accumulation
        return {
            "learning_rate": float(self.schedule(update)),
            "bad_records": info["bad"],
            "compilations": self.compiled.count,
            **telemetry.memory(),
        }

    def save(self, number: int, state: TrainState, position: Mapping[str, Any]) -> None:
        """Saves what trains, the optimizer, the data position, the stage and the base's hash.

        Args:
          number: micro-batches behind the state.
          state: to be saved.
          position: of the data, on this host.
        """
        about = {
            "data": self.everywhere(number, position),
            "stage": dataclasses.asdict(self.stage),
            "base": dict(self.base),
            "media": manifest.media_settings(self.stage.data),
        }
        metric, scores = self.stage.best.metric, jax.device_get(self.scores)
        self.scores = []
        found = {metric: telemetry.mean(scores)} if scores else None
        self.checkpoints.save(number, startup.saved_arrays(state), about, found)

    def everywhere(self, number: int, position: Mapping[str, Any]) -> dict[str, Any]:
        """A data position with the counts of records of all hosts (on host 0, which saves)."""
        own = [position["seen"], position["bad"]]
        seen, bad = map(sum, zip(*hosts.gather(self.store, f"position/{number}", own)))
        return {**position, "seen": seen, "bad": bad}

    def score(self, metrics: Metrics) -> None:
        """Notes the metric that the best checkpoint is chosen by.

        Raises:
          UserError: the step has no such metric.
        """
        name = self.stage.best.metric
        if validation.follows(self.stage):
            self.scores = []  # a measurement is of the state that it met
            return
        if name and name not in metrics:
            raise UserError(
                f"no metric {name!r} in training",
                field="best.metric",
                hint=f"Choices: {', '.join(sorted(metrics.keys() - {telemetry.TERMS}))}",
            )
        if name:
            self.scores.append(telemetry.score(metrics, name))
