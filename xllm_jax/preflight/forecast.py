"""The preflight of a stage on a slice: compile, count, and search the largest batch that fits."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, cast

import jax
from jax.sharding import Mesh

from xllm_jax.assembly import networks
from xllm_jax.assembly.system import System
from xllm_jax.core import flops, prng
from xllm_jax.core.batch import Batch
from xllm_jax.core.stage import Stage
from xllm_jax.preflight import (
    collectives,
    cycles,
    hlo,
    memory,
    micro_batch,
    refusal,
    roofline,
    targets,
)
from xllm_jax.preflight.collectives import Collective
from xllm_jax.preflight.cycles import Cycles
from xllm_jax.preflight.memory import Memory
from xllm_jax.preflight.refusal import Refusal
from xllm_jax.preflight.roofline import Roofline
from xllm_jax.preflight.targets import Target
from xllm_jax.training.step import TrainState
from xllm_jax.training.trainer import Trainer

LISTED = 8  # tensors named per table


@dataclasses.dataclass(frozen=True)
class Forecast:
    """One step of a stage on a slice.

    Attributes:
      stage, target: what and where.
      mesh: {axis: size}.
      memory: bytes on one chip.
      fits: whether that is less than the chip has; what nothing was compiled for is arithmetic.
      compiled: whether the figures come from a compiled program.
      flops, minimum: FLOPs that a micro-step does and needs, over all chips.
      readable: whether the program could be read; if not, traffic and collectives are unknown.
      traffic: bytes one chip moves in its memory.
      collectives: every collective of the program.
      parameters, temporaries: (name, bytes) of the largest tensors on a chip; temporaries are those
        of the compiled program.
      kept: (name, bytes) of the largest tensors that autodiff keeps, where nothing was compiled.
      seconds: CPU seconds of compiling; on an idle machine it takes no longer than that.
      limit: bytes that the compiler may use of a chip, as its refusal states it; else all.
      cycles: what the compiler itself expects; None where it states none.
      plain: cycles of a plain product by the same compiler (`cycles.plain`); 0 where not known.
    """

    stage: Stage
    target: Target
    mesh: dict[str, int]
    memory: Memory
    fits: bool
    compiled: bool
    flops: float
    minimum: float
    readable: bool = True
    traffic: int = 0
    collectives: tuple[Collective, ...] = ()
    parameters: tuple[tuple[str, int], ...] = ()
    temporaries: tuple[tuple[str, int], ...] = ()
    kept: tuple[tuple[str, int], ...] = ()
    seconds: float = 0.0
    limit: int = 0
    cycles: Cycles | None = None
    plain: int = 0

    @property
    def capacity(self) -> int:
        """Bytes of a chip that the step may take."""
        return self.limit or self.target.chip.memory

    @property
    def micro_steps(self) -> int:
        """Micro-steps of the whole stage."""
        return self.stage.steps * self.stage.optimizer.accumulation

    @property
    def roofline(self) -> Roofline:
        """Of one micro-step."""
        sent = {
            between: sum(one.times * one.sent for one in self.moved(between))
            for between in (False, True)
        }
        return roofline.estimate(self.target, self.flops, self.traffic, sent[False], sent[True])

    @property
    def expected(self) -> float:
        """Seconds of one micro-step by the compiler's cycles; 0 where none are known.

        What the core needs, or what links or network need where that is longer.
        """
        clock = self.target.chip.clock
        if self.cycles is None or not clock:
            return 0.0
        line = self.roofline
        return max((self.cycles.core + self.cycles.links) / clock, line.links, line.network)

    def moved(self, between: bool) -> list[Collective]:
        """The collectives between slices, or those inside of one."""
        return [one for one in self.collectives if one.between == between]


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A step that is traced for a slice but not compiled yet.

    Attributes:
      trainer: with the jitted step and its loss, on the mesh where it shall run.
      state, batch: its arguments, shapes only.
    """

    trainer: Trainer
    state: TrainState
    batch: Batch

    @property
    def device_mesh(self) -> Mesh:
        """Where the step shall run."""
        return self.trainer.system.device_mesh

    @functools.cached_property
    def traced(self) -> jax.stages.Traced:
        """The step's one trace: what is counted is what is compiled."""
        real = isinstance(self.device_mesh, Mesh)
        with jax.set_mesh(self.device_mesh) if real else contextlib.nullcontext():
            return self.trainer.step.trace(self.state, self.batch)

    @functools.cached_property
    def useful(self) -> float:
        """FLOPs that a micro-step cannot do without, over all chips."""
        state = self.state
        return flops.useful(self.trainer.loss, state.trainable, state.frozen, self.batch)


def prepare(stage: Stage, target: Target, compiles: bool = True) -> Lowered:
    """The step of `training/step.py` and the shapes of its arguments; nothing is allocated.

    Args:
      stage, target: what and where.
      compiles: whether it shall be compiled, which needs the devices' description.

    Raises:
      UserError: the stage, its mesh or its rows do not fit together.
    """
    device_mesh = targets.make_mesh(stage.mesh, stage.slices, target, compiles)
    model = networks.model(for_accelerators(stage, target))
    # An abstract mesh gives the same shardings; nothing runs on it.
    trainer = Trainer(System(stage, model, cast(Mesh, device_mesh)))
    return Lowered(trainer, trainer.abstract_state, micro_batch.sharded(stage.data, device_mesh))


def for_accelerators(stage: Stage, target: Target) -> Stage:
    """The stage with the networks that an accelerator gets where this machine would choose others.

    The depthwise convolution is chosen by the backend, and that is the CPU while compiling ahead.
    """
    if target.kind == "local":
        return stage
    parts = {
        name: dataclasses.replace(part, fields={"depthwise": "conv", **part.fields})
        if part.network == "conformer.SpeechEncoder"
        else part
        for name, part in stage.parts.items()
    }
    return dataclasses.replace(stage, parts=parts)


def make(stage: Stage, target: Target) -> Forecast:
    """Compiles the step for the stage's slices and accounts for it; arithmetic alone for GPUs.

    Args:
      stage: what; its `slices` says how many there are.
      target: one of them.

    Raises:
      UserError: see `prepare`.
    """
    target = targets.repeated(target, stage.slices)
    if not target.compiles:
        return arithmetic(stage, target)
    lowered = prepare(stage, target)
    common = uncompiled(stage, target, lowered)
    started = time.process_time()
    try:
        with jax.set_mesh(lowered.device_mesh):
            compiled = lowered.traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        refused = refusal.read(str(error))
        if refused is None:
            raise
        return from_refusal(refused, lowered, common, time.process_time() - started)
    seconds = time.process_time() - started
    return from_compiled(compiled, lowered, common, seconds)


def read(compiled: jax.stages.Compiled) -> hlo.Program | None:
    """The program's text, parsed; None where it cannot be read.

    The text of a step for v5p holds an instruction that jaxlib 0.10 refuses to read again.
    """
    try:
        return hlo.parse(compiled.as_text() or "")
    except jax.errors.JaxRuntimeError:
        return None


def counts(lowered: Lowered) -> dict[str, float]:
    """FLOPs done and needed by one micro-step, over all chips."""
    return {"flops": flops.of_trace(lowered.traced), "minimum": lowered.useful}


def from_compiled(
    compiled: jax.stages.Compiled, lowered: Lowered, common: dict[str, Any], seconds: float
) -> Forecast:
    """The account of a compiled step.

    Args:
      compiled: the program.
      lowered: what was compiled.
      common: what `uncompiled` gives.
      seconds: CPU seconds of compiling.
    """
    program, used = read(compiled), compiled.memory_analysis()
    target = common["target"]
    account = memory.account(
        lowered.state, lowered.batch, used.temp_size_in_bytes, used.generated_code_size_in_bytes
    )
    return Forecast(
        **common,
        memory=account,
        fits=target.kind == "local" or account.total <= target.chip.memory,
        compiled=True,
        readable=program is not None,
        traffic=roofline.traffic(program) if program else 0,
        collectives=tuple(_collectives(program, lowered, common["stage"], target))
        if program
        else (),
        temporaries=tuple(memory.largest_temporaries(program, LISTED)) if program else (),
        seconds=seconds,
        **_cycles(program, target),
    )


def _cycles(program: hlo.Program | None, target: Target) -> dict[str, Any]:
    """What the compiler expects of a program, and of a plain product beside it."""
    found = cycles.count(program) if program else None
    known = found is not None and target.chip.clock
    return {"cycles": found, "plain": cycles.plain(target) if known else 0}


def _collectives(
    program: hlo.Program, lowered: Lowered, stage: Stage, target: Target
) -> list[Collective]:
    """Those of the program, which is that of one slice where there are several."""
    if target.kind != "local":
        return collectives.find(program, target.chips // target.slices)
    numbers = targets.slices_of(lowered.device_mesh, stage.slices)
    return collectives.find(program, target.chips, numbers)


def from_refusal(
    refused: Refusal, lowered: Lowered, common: dict[str, Any], seconds: float
) -> Forecast:
    """The account of a step that the compiler refused, with what autodiff keeps.

    Args:
      refused: what the compiler said.
      lowered: the step.
      common: fields of the forecast that are known already.
      seconds: of compiling, until it was refused.
    """
    arguments = memory.account(lowered.state, lowered.batch, 0)
    account = dataclasses.replace(arguments, temporaries=max(refused.total - arguments.total, 0))
    return Forecast(
        **common,
        memory=account,
        fits=False,
        compiled=True,
        kept=tuple(memory.largest_kept(kept(lowered), common["target"].chips, LISTED)),
        seconds=seconds,
        limit=refused.limit,
    )


def kept(lowered: Lowered) -> list[memory.Kept]:
    """What autodiff keeps of a step."""
    key = jax.eval_shape(lambda: prng.key(0))
    state = lowered.state
    return memory.kept(lowered.trainer.loss, state.trainable, state.frozen, lowered.batch, key)


def uncompiled(stage: Stage, target: Target, lowered: Lowered) -> dict[str, Any]:
    """The fields of a Forecast that need no compiler.

    Args:
      stage, target: what and where.
      lowered: the traced step.
    """
    return {
        "stage": stage,
        "target": target,
        "mesh": dict(lowered.device_mesh.shape),
        "parameters": tuple(memory.largest_parameters(lowered.state, LISTED)),
        **counts(lowered),
    }


def arithmetic(stage: Stage, target: Target) -> Forecast:
    """The account without compiling: temporaries are what autodiff keeps, without any kernel's own.

    Raises:
      UserError: see `prepare`.
    """
    target = targets.repeated(target, stage.slices)
    lowered = prepare(stage, target, compiles=False)
    common = uncompiled(stage, target, lowered)
    found = kept(lowered)
    account = memory.account(lowered.state, lowered.batch, memory.residuals(found) // target.chips)
    fits = not target.chip.memory or account.total <= target.chip.memory
    listed = tuple(memory.largest_kept(found, target.chips, LISTED))
    return Forecast(**common, memory=account, fits=fits, compiled=False, kept=listed)


def candidates(stage: Stage, chips: int) -> list[int]:
    """Micro-batches that split over the chips and divide the stage's update, ascending."""
    update = micro_batch.rows(stage) * stage.optimizer.accumulation
    return [rows for rows in range(chips, update + 1, chips) if update % rows == 0]


def largest(
    stage: Stage,
    target: Target,
    known: Forecast | None = None,
    compile_: Callable[[Stage, Target], Forecast] = make,
) -> Forecast | None:
    """The forecast with the largest micro-batch that fits, of the same update; None when none does.

    Tries the whole update first. What does not fit says how much it wanted, and temporaries grow
    with the rows: so the next try is the largest that should fit. The TPU compiler refuses what is
    much too large before it compiles, so that of few tries only the last one costs its time.

    Args:
      stage, target: as for `make`.
      known: the forecast of the stage as it is, which is not compiled again.
      compile_: makes a forecast.
    """
    target = targets.repeated(target, stage.slices)
    device_mesh = targets.make_mesh(stage.mesh, stage.slices, target, compiles=False)
    options = candidates(stage, device_mesh.shape["data"] * device_mesh.shape["fsdp"])
    while options:
        rows = options.pop()
        found = known if rows == micro_batch.rows(stage) else None
        found = found or compile_(micro_batch.with_rows(stage, rows), target)
        if found.fits:
            return found
        account = found.memory
        free = found.capacity - (account.total - account.temporaries - account.batch)
        share = free / (account.temporaries + account.batch)
        options = [option for option in options if option <= max(rows * share, options[0])]
    return None
