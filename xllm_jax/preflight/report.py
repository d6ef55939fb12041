"""The page of a preflight: text for people, JSON for programs."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

from xllm_jax.preflight import collectives, inputs, memory
from xllm_jax.preflight.collectives import Collective
from xllm_jax.preflight.plan import Plan
from xllm_jax.preflight.records import Look

DAY = 86400.0


def record(plan: Plan, largest: Plan | None, look: Look | None) -> dict[str, Any]:
    """Everything as plain data.

    Args:
      plan: of the stage as it is configured.
      largest: of the largest micro-batch that fits, when it was searched.
      look: at the data, when it was taken.
    """
    made = {"stage": plan.stage.name, "topology": plan.target.name, **_plan(plan)}
    if largest is not None:
        made["largest"] = {**_plan(largest), "flags": flags(largest)}
    if look is not None:
        made["records"] = dataclasses.asdict(look)
    return made


def _plan(plan: Plan) -> dict[str, Any]:
    return {
        "slices": plan.target.slices,
        "chips": plan.target.chips,
        "mesh": plan.mesh,
        "rows": inputs.rows_of(plan.stage.data),
        "accumulation": plan.stage.optimizer.accumulation,
        "fits": plan.fits,
        "compiled": plan.compiled,
        "readable": plan.readable,
        "compile_seconds": plan.seconds,
        "memory_per_chip": memory.as_dict(plan.memory),
        "chip_memory": plan.target.chip.memory,
        "room": plan.room,
        "flops": plan.flops,
        "minimum_flops": plan.minimum,
        "traffic_per_chip": plan.traffic,
        "collectives": collectives.totals(plan.moved(between=False)),
        "collectives_between_slices": collectives.totals(plan.moved(between=True)),
        "largest_parameters": dict(plan.parameters),
        "largest_temporaries": dict(plan.temporaries),
        "largest_kept": dict(plan.kept),
        "speed": speed(plan),
    }


def speed(plan: Plan) -> dict[str, Any]:
    """What the roofline allows: seconds of a micro-step, rates, and the whole stage's length."""
    line = plan.roofline
    if not line.seconds:
        return {}
    days = plan.micro_steps * line.seconds / DAY
    return {
        **dataclasses.asdict(line),
        "seconds": line.seconds,
        "limit": line.limit,
        "samples_per_second": plan.stage.data.examples / line.seconds,
        "tokens_per_second": inputs.tokens_of(plan.stage.data) / line.seconds,
        "useful_share_of_peak": plan.minimum
        / (line.seconds * plan.target.chips * plan.target.chip.flops),
        "days": days,
        "chip_hours": days * 24 * plan.target.chips,
    }


def text(plan: Plan, largest: Plan | None, look: Look | None) -> str:
    """The page."""
    lines = [f"{plan.stage.name} on {plan.target.title}, {plan.target.chips} chips", ""]
    lines += _page(plan)
    if largest is not None and largest is not plan:
        lines += ["", "Largest micro-batch of the same update that fits:", "", *_page(largest)]
        lines += _gain(plan, largest)
    if not plan.fits:
        lines += ["", *_refused(plan), "What takes most of a chip:", "", *_blame(plan, largest)]
    if look is not None:
        lines += ["", *_look(look)]
    return "\n".join(lines) + "\n"


def flags(plan: Plan) -> str:
    """What makes the micro-batch of a plan, on the command line."""
    data, given = plan.stage.data, {}
    if inputs.packs(data):
        given["data.rows"] = data.rows
    given["data.examples"] = data.examples
    given["optimizer.accumulation"] = plan.stage.optimizer.accumulation
    return " ".join(f"--config.{name}={value}" for name, value in given.items())


def _gain(plan: Plan, largest: Plan) -> list[str]:
    """What the user gains by which flags, in one line."""
    found = speed(largest)
    if not (found and largest.compiled and largest.readable):
        return [f"with          {flags(largest)}"]
    rate = f"{found['samples_per_second']:.0f} samples/s at best"
    if plan.fits:
        rate += f" instead of {speed(plan)['samples_per_second']:.0f}"
    return [f"with          {flags(largest)}: {rate}"]


def _refused(plan: Plan) -> list[str]:
    """In words, whether the compiler or the arithmetic says so, and by how much."""
    over = f"{gib(plan.memory.total)} GiB a chip, {gib(plan.memory.total - plan.room)} too many."
    if not plan.compiled:
        return [f"It does not fit by arithmetic: {over}"]
    lines = [f"It does not fit: the compiler wants {over}"]
    if plan.kept:
        lines += [
            "It names no arrays; what autodiff keeps is listed with its shape over all chips."
        ]
    return lines


def _page(plan: Plan) -> list[str]:
    lines = [*_batch(plan), *_memory(plan), *_flops(plan)]
    return [*lines, *_collectives(plan), *_speed(plan)] if plan.fits else lines


def _batch(plan: Plan) -> list[str]:
    data, mesh = plan.stage.data, ", ".join(f"{a} {n}" for a, n in plan.mesh.items())
    return [
        f"micro-batch   {inputs.rows_of(data)} rows, {data.examples} examples, "
        f"{inputs.tokens_of(data)} tokens; {plan.stage.optimizer.accumulation} an update",
        f"mesh          {mesh}",
    ]


def _memory(plan: Plan) -> list[str]:
    used, held = plan.memory, plan.room
    parts = ", ".join(f"{name} {gib(size)}" for name, size in dataclasses.asdict(used).items())
    of = f" of {gib(held)}: {'fits' if plan.fits else 'DOES NOT FIT'}" if held else ""
    how = "" if plan.compiled else " (arithmetic, not compiled: what autodiff keeps, no kernels)"
    lines = [f"GiB per chip  {gib(used.total)}{of}{how}", f"              {parts}"]
    return lines + ([f"compiling     {plan.seconds:.0f} s of one core"] if plan.compiled else [])


def _flops(plan: Plan) -> list[str]:
    return [
        f"TFLOP a step  {plan.flops / 1e12:.2f}, the stage needs {plan.minimum / 1e12:.2f} "
        f"(x {plan.flops / plan.minimum:.3f})"
    ]


def _collectives(plan: Plan) -> list[str]:
    if not plan.readable:
        return ["collectives   unknown, as is memory traffic: jaxlib cannot read this program"]
    lines = _moved("collectives", plan.moved(between=False))
    if plan.target.slices > 1:
        lines += _moved("of slices", plan.moved(between=True))
    return lines


def _moved(title: str, found: list[Collective]) -> list[str]:
    """A line for each kind of collective."""
    return [
        f"{'' if number else title:13} {kind}: {row['count']:.0f}, "
        f"{row['bytes'] / 1e9:.3f} GB of results, {row['sent'] / 1e9:.3f} GB sent by a chip"
        for number, (kind, row) in enumerate(sorted(collectives.totals(found).items()))
    ]


def _speed(plan: Plan) -> list[str]:
    found = speed(plan)
    if not found:
        return []
    return [
        f"at best       {found['seconds'] * 1e3:.1f} ms a micro-step, limited by {found['limit']} "
        f"(arithmetic {found['arithmetic'] * 1e3:.1f}, memory {found['memory'] * 1e3:.1f}, "
        f"links {found['links'] * 1e3:.1f}{_network(plan, found['network'])})",
        f"              {found['samples_per_second']:.0f} samples/s, "
        f"{found['tokens_per_second']:.0f} tokens/s, "
        f"{100 * found['useful_share_of_peak']:.0f} % of peak on needed FLOPs",
        f"whole stage   {found['days']:.2f} days, {found['chip_hours']:.0f} chip-hours",
    ]


def _network(plan: Plan, seconds: float) -> str:
    """The time between slices, where there are several."""
    if plan.target.slices == 1:
        return ""
    known = plan.target.chip.network
    return f", between slices {seconds * 1e3:.1f}" if known else ", between slices not known"


def _blame(plan: Plan, largest: Plan | None) -> list[str]:
    """The largest tensors: the compiler's, what autodiff keeps, or those of the batch that fits."""
    rows = [(f"parameter {path}", size) for path, size in plan.parameters]
    known = plan if plan.temporaries or plan.kept else largest
    if known is not None and known.temporaries:
        scale = inputs.rows_of(plan.stage.data) / inputs.rows_of(known.stage.data)
        note = "" if scale == 1 else f" (of {inputs.rows_of(known.stage.data)} rows)"
        rows += [(f"temporary {name}{note}", size) for name, size in known.temporaries]
    rows += [(f"kept {name}", size) for name, size in plan.kept]
    rows += [("all temporaries", plan.memory.temporaries), ("all optimizer", plan.memory.optimizer)]
    return [f"{gib(size):>8}  {name}" for name, size in sorted(rows, key=lambda row: -row[1])]


def _look(look: Look) -> list[str]:
    if look.absent:
        return [f"data          not looked at: {look.absent}"]
    lines = [
        f"data          {look.read} records looked at, {look.placed} placed in {look.batches} "
        f"batches, {look.supervised} supervised tokens"
    ]
    common = sorted(look.reasons.items(), key=lambda row: -row[1])[:5]
    return lines + [f"              {count} left out: {reason}" for reason, count in common]


def gib(size: float) -> str:
    """Bytes as GiB."""
    return f"{size / 2**30:.2f}"


def write(directory: str | Path, name: str, page: str, plain: dict[str, Any]) -> list[Path]:
    """Writes NAME.txt and NAME.json; each file is whole or not there."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for ending, content in (("txt", page), ("json", json.dumps(plain, indent=1, default=_plain))):
        file = directory / f"{name}.{ending}"
        partial = file.with_name(file.name + ".partial")
        partial.write_text(content, encoding="utf-8")
        os.replace(partial, file)
        written.append(file)
    return written


def _plain(value: Any) -> Any:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else str(value)
