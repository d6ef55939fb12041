"""Chooses for the user: the micro-batch, mesh and remat with the best forecast, the same update.

All candidates are ranked by arithmetic: FLOPs at what compiled steps reach, parameters that have to
be gathered over the links, and what has to fit a chip. The best few are then compiled, as long as
there is time, and the compiler's own cycles decide. Without the compiler the arithmetic decides.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from xllm_jax.core import rules
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Stage
from xllm_jax.models import layers, lora
from xllm_jax.preflight import forecast, memory, micro_batch, targets
from xllm_jax.preflight.forecast import Forecast
from xllm_jax.preflight.targets import Target
from xllm_jax.training import trainer

REACHED = 0.5  # share of the peak that compiled steps reach by their forecasts: 0.4 to 0.6
ROOM = 0.95  # of a chip's memory that arguments and temporaries may take by arithmetic
KERNELS = 1.3  # temporaries of compiled steps over what autodiff keeps: 1.0 to 1.8
PACKED = "int8"


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to do a stage's update.

    Attributes:
      stage: with its micro-batch, accumulation, mesh, remat and packed parts.
      seconds: of an update, by arithmetic.
      fits: whether a chip has room for it, by arithmetic.
    """

    stage: Stage
    seconds: float
    fits: bool


@dataclasses.dataclass(frozen=True)
class Choice:
    """What was chosen, and from what.

    Attributes:
      stage: the one to train.
      flags: that make it from the stage as it is configured.
      seconds: of an update, by forecast or arithmetic.
      compiled: how many candidates were compiled; with 0 the arithmetic alone has decided.
      ranked: how many there were.
      made: the chosen one's forecast, where it was compiled.
      notes: what the user has to do besides.
    """

    stage: Stage
    flags: tuple[str, ...]
    seconds: float
    compiled: int
    ranked: int
    made: Forecast | None = None
    notes: tuple[str, ...] = ()


def choose(
    stage: Stage,
    target: Target,
    tries: int = 3,
    limit: float = 600.0,
    compile_: Callable[[Stage, Target], Forecast] = forecast.make,
    clock: Callable[[], float] = time.monotonic,
    rows: int = 0,
) -> Choice:
    """The candidate with the shortest update that fits.

    Args:
      stage: as it is configured; its update, rows x accumulation, stays what it is.
      target: one slice; the stage says how many.
      tries: compilations at most, beside those that the compiler refuses for lack of memory; with 0
        the arithmetic alone decides.
      limit: seconds after which no further compilation begins that would pass them.
      compile_: makes a forecast.
      clock: seconds.
      rows: of a micro-batch, where they have to be these.

    Raises:
      UserError: nothing fits, or the stage does not fit together.
    """
    ranked = rank(stage, target, rows)
    fitting = [one for one in ranked if one.fits]
    if not fitting:
        raise _nothing(stage, target, rows, bool(ranked))
    if not tries or not can_compile(target):
        return _choice(stage, fitting[0], fitting[0].seconds, 0, len(ranked))
    found, began, longest = [], clock(), 0.0
    for one in fitting:
        started = clock()
        if len(found) == tries or started - began + longest > limit:
            break
        made = compile_(one.stage, target)
        longest = max(longest, clock() - started)
        if made.fits:
            found.append((_update(made), one, made))
    if not found:
        return _choice(stage, fitting[0], fitting[0].seconds, 0, len(ranked))
    seconds, one, made = min(found, key=lambda row: row[0])
    return _choice(stage, one, seconds, len(found), len(ranked), made)


def _nothing(stage: Stage, target: Target, rows: int, divides: bool) -> UserError:
    """Why there is nothing to choose from."""
    if divides:
        what, hint = "fits {} by arithmetic", "Choose a larger slice"
    else:
        what, hint = "splits over {}", "Choose a number of chips that divides the update's rows"
    batch = f"micro-batch of {rows} rows" if rows else "micro-batch"
    what = f"no {batch} of {stage.name or 'this stage'} {what.format(target.title)}"
    return UserError(what, field="--topology", hint=hint)


def _update(made: Forecast) -> float:
    """Seconds of an update: by the compiler's cycles, else by the roofline."""
    return (made.expected or made.roofline.seconds) * made.stage.optimizer.accumulation


def can_compile(target: Target) -> bool:
    """Whether the compiler for a slice is here; it states cycles for TPUs alone."""
    try:
        return target.chip.axes > 0 and bool(targets.devices(target))
    except UserError:
        return False


def _choice(
    stage: Stage,
    one: Candidate,
    seconds: float,
    compiled: int,
    ranked: int,
    made: Forecast | None = None,
) -> Choice:
    notes = tuple(
        f"xllm quantize --input={stage.init.get(name) or f'bases/{name}'} "
        f"--output={one.stage.init[name]} --weights={PACKED} --part={name}"
        for name in packed_parts(stage, one.stage)
    )
    return Choice(one.stage, flags(stage, one.stage), seconds, compiled, ranked, made, notes)


def flags(before: Stage, after: Stage) -> tuple[str, ...]:
    """What makes one stage of another on the command line; only what a choice may change."""
    wanted = dict(_settings(after))
    known = dict(_settings(before))
    return tuple(
        f"--config.{name}={value}" for name, value in wanted.items() if known[name] != value
    )


def _settings(stage: Stage) -> Iterator[tuple[str, Any]]:
    form = micro_batch.form(stage)
    yield f"data.{form.rows_field}", form.rows
    yield "data.examples", stage.data.examples
    yield "optimizer.accumulation", stage.optimizer.accumulation
    for name in ("log_every", "save_every"):
        yield name, getattr(stage, name)
    yield "validation.every", stage.validation.every
    for axis in ("data", "fsdp", "tensor"):
        yield f"mesh.{axis}", stage.mesh.get(axis, 1)
    yield "remat", stage.remat
    for name, part in stage.parts.items():
        yield f"parts.{name}.weights", part.weights
        yield f"init.{name}", stage.init.get(name, "")


def variant(
    stage: Stage, rows: int, axes: Mapping[str, int], remat: str, parts: Collection[str] = ()
) -> Stage:
    """The same update of a stage, done in another way.

    Args:
      stage: as it is configured.
      rows: of a micro-batch; they divide the update.
      axes: sizes of the mesh.
      remat: see `Stage.remat`.
      parts: whose frozen kernels are packed.
    """
    packed = _packed(stage, parts)
    changed = micro_batch.with_rows(_with(packed, mesh=dict(axes), remat=remat), rows)
    return _cadence(changed, stage)


def packed_parts(before: Stage, after: Stage) -> list[str]:
    """The parts whose kernels are packed in one stage and not in another."""
    return [n for n, part in after.parts.items() if part.weights != before.parts[n].weights]


def rank(stage: Stage, target: Target, rows: int = 0) -> list[Candidate]:
    """All candidates, those that fit first, then by the seconds of an update.

    Frozen kernels in int8 are other numbers than those of the config: they are looked at only where
    nothing fits without.

    Args:
      stage, target, rows: as of `choose`.
    """
    target = targets.repeated(target, stage.slices)
    found = _ranked(stage, target, (), rows)
    if found and not any(one.fits for one in found) and _packable(found[0].stage, target):
        found += _ranked(stage, target, ("llm",), rows)
    return sorted(found, key=lambda one: (not one.fits, one.seconds))


def _packed(stage: Stage, names: Collection[str]) -> Stage:
    """The stage with parts' kernels in int8, from bases that `xllm quantize` writes."""
    parts = {n: dataclasses.replace(stage.parts[n], weights=PACKED) for n in names}
    init = {n: f"bases/{n}_{PACKED}" for n in names}
    return _with(stage, parts=stage.parts | parts, init=stage.init | init)


def _packable(stage: Stage, target: Target) -> bool:
    """Whether there is an LLM whose kernels neither train nor are packed already."""
    part = stage.parts.get("llm")
    if part is None or part.weights:
        return False
    trainable = rules.flatten(forecast.prepare(stage, target, compiles=False).state.trainable)
    return not any(path.startswith("llm/") and not lora.is_adapter(path) for path in trainable)


def _ranked(stage: Stage, target: Target, parts: Collection[str], fixed: int) -> list[Candidate]:
    """The candidates with one choice of packed parts."""
    packed = _packed(stage, parts)
    traced = functools.cache(lambda remat: _traced(_with(packed, remat=remat), target))
    found: list[Candidate] = []
    for axes in meshes(stage, target):
        split = axes["data"] * axes["fsdp"] * _outer(stage)
        choices = row_choices(stage, split, fixed)
        if not choices:
            continue
        first = variant(stage, choices[0], axes, stage.remat, parts)
        lowered = forecast.prepare(first, target, compiles=False)
        for remat in remats(stage):
            per_row = traced(remat)
            found += [
                _candidate(variant(stage, rows, axes, remat, parts), target, lowered, *per_row)
                for rows in choices
            ]
    return found


def _traced(stage: Stage, target: Target) -> tuple[float, float]:
    """FLOPs, and bytes that autodiff keeps, of one row over all chips."""
    smallest = _with(stage, mesh={"data": 1, "fsdp": -1, "tensor": 1})
    split = targets.make_mesh(smallest.mesh, stage.slices, target, compiles=False).shape["fsdp"]
    rows = next(iter(row_choices(stage, split)), micro_batch.rows(stage))
    made = micro_batch.with_rows(smallest, rows)
    lowered = forecast.prepare(made, target, compiles=False)
    kept = memory.residuals(forecast.kept(lowered))
    return forecast.counts(lowered)["flops"] / rows, kept / rows


def _candidate(
    stage: Stage, target: Target, lowered: forecast.Lowered, flops: float, kept: float
) -> Candidate:
    """By arithmetic: the longer of products and links, and what a chip has to hold.

    Args:
      stage, target: what and where.
      lowered: the step on this mesh, with any number of rows: the state is the same.
      flops, kept: of one row, over all chips.
    """
    chip, rows, state = target.chip, micro_batch.rows(stage), lowered.state
    axes = lowered.device_mesh.shape
    held = sum(memory.held(half) for half in (state.trainable, state.frozen, state.optimizer))
    room = held + KERNELS * kept * rows / target.chips
    share = (axes["fsdp"] - 1) / axes["fsdp"]
    frozen, trainable = memory.held(state.frozen), memory.held(state.trainable)
    # Every chip is sent what it lacks, forward and backward; gradients are summed over all rows.
    gathered = 2 * share * axes["fsdp"] * (frozen + trainable)
    copies = axes["data"] * axes["fsdp"]
    summed = 2 * trainable * axes["fsdp"] * (copies - 1) / copies
    links = (gathered + summed) / target.sends if target.sends else 0.0
    products = flops * rows / (target.chips * chip.flops * REACHED) if chip.flops else 0.0
    # Layers' weights are copied out of their stacks, forward and backward, whatever the rows.
    copied = 2 * frozen * axes["fsdp"] / chip.bandwidth if chip.bandwidth else 0.0
    seconds = (max(products, links) + copied) * stage.optimizer.accumulation
    return Candidate(stage, seconds, not chip.memory or room <= ROOM * chip.memory)


def meshes(stage: Stage, target: Target) -> list[dict[str, int]]:
    """Splits of one slice over 'data' and 'fsdp'; 'tensor' stays as the stage has it.

    Raises:
      UserError: the stage's own mesh does not fit.
    """
    made = targets.make_mesh(stage.mesh, stage.slices, target, compiles=False).shape
    inner = target.chips // _outer(stage) // made["tensor"]
    return [
        {"data": inner // split, "fsdp": split, "tensor": made["tensor"]}
        for split in range(inner, 0, -1)
        if inner % split == 0
    ]


def _outer(stage: Stage) -> int:
    """How many slices there are."""
    count = 1
    for over in stage.slices.values():
        count *= over
    return count


def remats(stage: Stage) -> list[str]:
    """The stage's own choice first, then the others."""
    return [stage.remat, *(name for name in layers.REMAT if name != stage.remat)]


def row_choices(stage: Stage, split: int, wanted: int = 0) -> list[int]:
    """Rows of micro-batches of the same update that divide over `split` parts, ascending.

    Only the stage's own where an update of several micro-batches is another one: the objective
    compares within a micro-batch, or micro-batches weigh the same whatever is in them.

    Args:
      stage: as it is configured.
      split: over how many parts a batch is.
      wanted: rows, where they have to be these.
    """
    rows, update = micro_batch.rows(stage), micro_batch.rows(stage) * stage.optimizer.accumulation
    whole = getattr(trainer.objective(stage), "WHOLE_BATCH", False)
    fixed = whole or stage.optimizer.averaging != "tokens"
    choices = [rows] if fixed else range(1, update + 1)
    return [
        n
        for n in choices
        if n % split == 0 and update % n == 0 and stage.data.examples * n % rows == 0
        if wanted in (0, n)
    ]


def _cadence(stage: Stage, before: Stage) -> Stage:
    """The stage with logs, checkpoints and held-out data after as many examples as before."""
    factor = stage.optimizer.accumulation / before.optimizer.accumulation

    def scaled(every: int) -> int:
        return max(round(every * factor), 1) if every else 0

    validation = dataclasses.replace(stage.validation, every=scaled(before.validation.every))
    return dataclasses.replace(
        stage,
        log_every=scaled(before.log_every),
        save_every=scaled(before.save_every),
        validation=validation,
    )


def _with(stage: Stage, **changed: object) -> Stage:
    return dataclasses.replace(stage, **changed)
