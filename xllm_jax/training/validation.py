"""Held-out data, measured while a stage trains: `Stage.validation` (docs/telemetry.md).

A measurement reads the same examples each time and changes nothing: it has its own pipeline, takes
no gradient, draws no random number, and its sums go over tokens or pairs of all batches, so that
neither padding nor a last batch with few examples weighs more or less than it holds.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from xllm_jax.assembly.system import System
from xllm_jax.core import hosts, mesh, rules
from xllm_jax.core.batch import B, Batch
from xllm_jax.core.errors import CannotWrite, UserError
from xllm_jax.core.stage import Data, Stage
from xllm_jax.core.types import Metrics, Params
from xllm_jax.core.watchdog import Watch
from xllm_jax.core.weighted_mean import WeightedMean
from xllm_jax.data import manifest
from xllm_jax.data.pipeline import Pipeline
from xllm_jax.data.record import Skipped
from xllm_jax.feature_cache import check
from xllm_jax.training import telemetry
from xllm_jax.training.step import Counts, Loss, TrainState
from xllm_jax.training.trainer import objective, stage_loss
from xllm_jax.training.validation_metrics import Metric, Planned, find_metrics

Made = TypeVar("Made")
Measured = tuple[TrainState, Params]
"""A state, not donated, and parameters that its training does without."""

Step = Callable[[Measured, Batch], tuple[dict[str, WeightedMean], dict[str, Any]]]
"""`step` with its losses and metrics filled in."""

PREFIX = "validation/"
QUARANTINE = "validation_quarantine"
THREADS = 4  # that read; a measurement comes seldom
TERM = "term of the loss: "  # before the names of sums that are no metrics themselves
SHOWN = ("loss", "accuracy", "cer")  # on the terminal


def step(
    measured: Measured,
    batch: B,
    *,
    loss: Loss[B],
    counts: Counts[B],
    task: Mapping[str, Callable[[Params, B], Made]],
) -> tuple[dict[str, WeightedMean], dict[str, Made]]:
    """One batch, without gradients.

    Args:
      measured: see `Measured`.
      batch: pytree of global arrays.
      loss: outside training, (params, batch, key) -> (scalar, metrics).
      counts: (batch, metrics) -> {metric: over how many it is the mean}.
      task: {metric: (params, batch) -> arrays}.

    Returns:
      ({metric: its sum}, {metric of the task: its arrays}).
    """
    state, unread = measured
    params = rules.join(rules.join(state.trainable, state.frozen), unread)
    value, metrics = loss(params, batch, None)
    found: Metrics = {**metrics, "loss": value}
    sums = {name: part for name, part in found.items() if isinstance(part, WeightedMean)}
    sums |= {f"{TERM}{name}": term for name, term in found.get("terms", {}).items()}
    for name, count in counts(batch, found).items():
        sums[name] = WeightedMean(found[name] * count, count)
    return sums, {name: outputs(params, batch) for name, outputs in task.items()}


class Evaluation:
    """Measures a stage's held-out data.

    Args:
      stage: with `validation`.
      jitted: the `step`.
      pipeline: one pass over the examples, of this host's rows.
      task: {metric: Metric}.
      unread: frozen parameters that training does not load, since what they make is cached.
      device_mesh: where the batches go.
      watch: over stalls; is notified of every batch.
      say: where a warning goes.
    """

    def __init__(
        self,
        stage: Stage,
        jitted: Step,
        pipeline: Pipeline,
        task: Mapping[str, Metric],
        unread: Params,
        device_mesh: Mesh,
        watch: Watch,
        say: Callable[[str], None] = print,
    ):
        self._every, self._total = (
            stage.validation.every,
            stage.steps * stage.optimizer.accumulation,
        )
        self._pipeline, self._task, self._unread = pipeline, task, unread
        self._jitted, self._met = jitted, False
        self._compiled = telemetry.Compilations(jitted, 1, say, "The held-out step")
        self._mesh, self._watch = device_mesh, watch
        self._left_out: tuple[Skipped, ...] = ()
        self._following = stage.best.metric.removeprefix(PREFIX) if follows(stage) else ""

    def check_best(self, state: TrainState) -> None:
        """Looks, before the first micro-batch, whether there is the metric of the best checkpoint.

        Raises:
          UserError: there is none of that name.
        """
        if self._following:
            batch, _ = next(self._batches())
            sums, outputs = jax.eval_shape(self._jitted, (state, self._unread), batch)
            self._check_name(outputs.keys() | {n for n in sums if not n.startswith(TERM)})

    def due(self, number: int) -> bool:
        """Whether the state behind micro-batch `number` is measured."""
        return number % self._every == 0 or number == self._total

    def measure(self, state: TrainState) -> dict[str, float]:
        """Scalars under their prefix; waits for the devices.

        Returns:
          The objective's means over all tokens (or pairs), the metrics of the task, `count`: of the
          loss, and `seconds`. What is no finite number is left out.

        Raises:
          UserError: nothing could be measured, or not the metric of the best checkpoint.
        """
        began, sums = time.monotonic(), {}
        if not self._met:
            self._watch.compiles()
            self._met = True
        for batch, info in self._batches():
            self._watch.moved("measures held-out data", info["keys"])
            for name, part in self._sums(state, batch, info["planned"]).items():
                before = sums.get(name, WeightedMean(0.0, 0.0))
                total = before.total + float(part.total)
                sums[name] = WeightedMean(total, before.count + float(part.count))
        found = _means(sums)
        self._check(found)
        found |= {"count": sums["loss"].count, "seconds": time.monotonic() - began}
        return {PREFIX + name: x for name, x in sorted(found.items()) if math.isfinite(x)}

    def _batches(self) -> Iterator[tuple[Batch, dict[str, Any]]]:
        left_out: tuple[Skipped, ...] = ()
        for batch, info in self._pipeline.iterate():
            left_out += info["skipped"]
            yield mesh.to_global(self._mesh, batch), info
        self._left_out = left_out

    def _sums(self, state: TrainState, batch: Batch, planned: Planned) -> dict[str, WeightedMean]:
        """Fetched: a batch at a time, so that a stall is reported with its batch."""
        sums, outputs = jax.device_get(self._compiled((state, self._unread), batch))
        return sums | {n: metric.measured(outputs[n], planned) for n, metric in self._task.items()}

    def _check(self, found: Mapping[str, float]) -> None:
        if "loss" not in found:
            raise UserError(
                f"none of {len(self._left_out)} examples can be used{self._first()}",
                field="validation.sources",
            )
        self._check_name(found.keys())

    def _check_name(self, found: Collection[str]) -> None:
        if self._following and self._following not in found:
            raise UserError(
                f"no metric {PREFIX + self._following!r} in the held-out data",
                field="best.metric",
                hint=f"Choices: {', '.join(PREFIX + name for name in sorted(found))}",
            )

    def format_message(self, number: int, found: Mapping[str, float]) -> str:
        """One line about a measurement."""
        shown = [f"{name} {found[PREFIX + name]:.4g}" for name in SHOWN if PREFIX + name in found]
        more = f"; {len(self._left_out)} left out{self._first()}" if self._left_out else ""
        seconds = f"{found[PREFIX + 'seconds']:.1f} s"
        return f"Held-out data at {number}: {', '.join(shown) or 'no numbers'} ({seconds}){more}"

    def _first(self) -> str:
        first = next(iter(self._left_out), None)
        return f", the first {first.file or first.key}: {first.reason}" if first else ""

    def close(self) -> None:
        """Stops counting compilations."""
        self._compiled.close()


def _means(sums: Mapping[str, WeightedMean]) -> dict[str, float]:
    """Means by what they count; the loss is the sum of its terms', each over what it is of."""
    found = {name: float(part.total / part.count) for name, part in sums.items() if part.count}
    terms = [found.pop(name) for name in list(found) if name.startswith(TERM)]
    return found | ({"loss": sum(terms)} if terms and "loss" in found else {})


def opened(
    system: System,
    state: TrainState,
    workdir: Path,
    watch: Watch,
    store: hosts.Store | None = None,
    say: Callable[[str], None] = print,
) -> Evaluation | None:
    """What measures a stage's held-out data; None where it measures none.

    Args:
      system: that trains.
      state: with the parameters that training has loaded; only their paths are read.
      workdir: the run's folder.
      watch: over stalls.
      store: of the hosts, to compare their data; None with one.
      say: where a warning goes.

    Raises:
      UserError: the settings contradict each other, the data cannot be read, or hosts differ.
    """
    stage, device_mesh = system.stage, system.device_mesh
    file = check_settings(stage)
    if not stage.validation.every:
        return None
    # Unrolled layers run faster on a CPU, but not by what compiling them takes longer.
    system = System.build(dataclasses.replace(stage, unroll=1), device_mesh).uncached
    chosen = find_metrics(stage.validation.metrics)
    task = {name: make(system) for name, make in chosen.items()}
    pipeline = open_pipeline(stage, device_mesh, workdir)
    hosts.agree(store, "held-out data", manifest.manifest(pipeline.data, pipeline.sources))
    others = watch.reading
    watch.reading = lambda: [*others(), *pipeline.activity.now()]
    known = rules.flatten(rules.join(state.trainable, state.frozen)).keys()
    unread = check.loaded(system, system.shapes.keys() - known)
    call = jitted(system, file, task)
    return Evaluation(stage, call, pipeline, task, unread, device_mesh, watch, say)


def jitted(system: System, file: ModuleType, task: Mapping[str, Metric]) -> Step:
    """The step as it runs on devices: every host gets the sums and the small arrays whole.

    Args:
      system: with the networks that measure.
      file: of the objective.
      task: {metric: Metric}.
    """

    def resident(outputs: Callable[[Params, B], Made], params: Params, batch: B) -> Made:
        return outputs(system.resident(params), batch)

    call = functools.partial(
        step,
        loss=stage_loss(system, train=False),
        counts=file.counts,
        task={n: functools.partial(resident, metric.outputs) for n, metric in task.items()},
    )
    return jax.jit(call, out_shardings=NamedSharding(system.device_mesh, PartitionSpec()))


def data_of(stage: Stage) -> Data:
    """The stage's data with the held-out sources, read themselves where training reads a cache, and
    all speech in the longest bucket: one program."""
    held, data = stage.validation, stage.data
    return dataclasses.replace(
        data,
        sources=held.sources,
        mix=held.mix,
        frames=tuple(data.frames[-1:]),
        threads=min(data.threads, THREADS),
        max_bad_share=1.0,
        cache="",
    )


def open_pipeline(stage: Stage, device_mesh: Mesh, workdir: Path) -> Pipeline:
    """One pass over the held-out examples; what cannot be read is listed in a file of its own.

    Args:
      stage: with `validation`.
      device_mesh: over which the hosts share a batch.
      workdir: the run's folder.
    """
    share, shares = mesh.host_share(device_mesh)
    host = jax.process_index()
    name = f"{QUARANTINE}.jsonl" if share == host else f"{QUARANTINE}-{host}.jsonl"
    try:
        return Pipeline(
            *(data_of(stage), 0, share, shares),
            train=False,
            quarantine=workdir / name,
            sample=stage.validation.examples,
        )
    except CannotWrite:
        raise
    except UserError as error:
        if not error.field.startswith("data."):
            hint = f"{error.hint}; or measure nothing held out, --config.validation.every=0"
            raise UserError(error.what, field=error.field, hint=hint.lstrip("; ")) from error
        field = error.field.replace("data.sources", "validation.sources")
        field = field.replace("data.mix", "validation.mix")
        raise UserError(error.what, field=field, hint=error.hint) from error


def follows(stage: Stage) -> bool:
    """Whether the best checkpoint is chosen by held-out data."""
    return stage.best.metric.startswith(PREFIX)


def check_settings(stage: Stage) -> ModuleType:
    """The file of the stage's objective, once the settings are found to fit together.

    Raises:
      UserError: they contradict each other.
    """
    held, file = stage.validation, objective(stage)
    for name in ("every", "examples"):
        if getattr(held, name) < 0:
            raise UserError("is negative", field=f"validation.{name}", hint="Give 0 or more")
    find_metrics(held.metrics)
    for problem in _problems(stage, file):
        raise problem
    return file


def _problems(stage: Stage, file: ModuleType) -> Iterator[UserError]:
    held, every, saves = stage.validation, stage.validation.every, stage.save_every
    if not every:
        if follows(stage):
            hint = "Set --config.validation.every"
            yield UserError("no held-out data is measured", field="best.metric", hint=hint)
        return
    if not held.sources:
        yield UserError(
            "names nothing", field="validation.sources", hint="Or set validation.every=0"
        )
    for name, source in held.sources.items():
        same = [other for other in stage.data.sources if stage.data.sources[other] == source]
        if same and held.mix.get(name, 1) and stage.data.mix.get(same[0], 1):
            where = f"validation.sources.{name}"
            what = f"is data.sources.{same[0]}, which is trained on"
            yield UserError(what, field=where, hint="Give it another split")
    if not hasattr(file, "counts"):
        what = f"the objective {stage.objective!r} has no means to add up"
        yield UserError(what, field="validation.every", hint="Set it to 0")
    if follows(stage) and every % saves and saves % every:
        what = (
            f"checkpoints every {saves} and measurements every {every} micro-batches miss another"
        )
        hint = "Let one be a multiple of the other"
        yield UserError(what, field="validation.every", hint=hint)
