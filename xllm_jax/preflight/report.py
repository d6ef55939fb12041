"""The page of a preflight: text for people, JSON for programs."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from xllm_jax.core import atomic
from xllm_jax.data.batching import batch_format
from xllm_jax.preflight import collectives, cycles, memory, micro_batch
from xllm_jax.preflight.collectives import Collective
from xllm_jax.preflight.forecast import Forecast
from xllm_jax.preflight.records import Look

DAY = 86400.0


def record(step: Forecast, largest: Forecast | None, look: Look | None) -> dict[str, Any]:
    """Everything as plain data.

    Args:
      step: of the stage as it is configured.
      largest: of the largest micro-batch that fits, when it was searched.
      look: at the data, when it was taken.
    """
    made = {"stage": step.stage.name, "topology": step.target.name, **_forecast(step)}
    if largest is not None:
        made["largest"] = {**_forecast(largest), "flags": flags(largest)}
    if look is not None:
        made["records"] = dataclasses.asdict(look)
    return made


def _forecast(step: Forecast) -> dict[str, Any]:
    return {
        "slices": step.target.slices,
        "chips": step.target.chips,
        "mesh": step.mesh,
        "rows": micro_batch.rows(step.stage),
        "accumulation": step.stage.optimizer.accumulation,
        "fits": step.fits,
        "compiled": step.compiled,
        "readable": step.readable,
        "compile_seconds": step.seconds,
        "memory_per_chip": memory.as_dict(step.memory),
        "chip_memory": step.target.chip.memory,
        "room": step.capacity,
        "flops": step.flops,
        "minimum_flops": step.minimum,
        "traffic_per_chip": step.traffic,
        "collectives": collectives.totals(step.moved(between=False)),
        "collectives_between_slices": collectives.totals(step.moved(between=True)),
        "largest_parameters": dict(step.parameters),
        "largest_temporaries": dict(step.temporaries),
        "largest_kept": dict(step.kept),
        "speed": speed(step),
        "forecast": forecast(step),
    }


def speed(step: Forecast) -> dict[str, Any]:
    """What the roofline allows: seconds of a micro-step, rates, and the whole stage's length."""
    line = step.roofline
    if not line.seconds:
        return {}
    days = step.micro_steps * line.seconds / DAY
    return {
        **dataclasses.asdict(line),
        "seconds": line.seconds,
        "limit": line.limit,
        "samples_per_second": step.stage.data.examples / line.seconds,
        "tokens_per_second": micro_batch.tokens(step.stage) / line.seconds,
        "useful_share_of_peak": step.minimum
        / (line.seconds * step.target.chips * step.target.chip.flops),
        "days": days,
        "chip_hours": days * 24 * step.target.chips,
    }


def forecast(step: Forecast) -> dict[str, Any]:
    """What the compiler's own cycles say: seconds of a micro-step, utilization, and where they go.

    Nothing where it states none. `utilization` is of the peak, on FLOPs that the stage needs;
    `on_core` leaves out any waiting for links.
    """
    if not step.expected or step.cycles is None:
        return {}
    chip, counted = step.target.chip, step.cycles
    needed = step.minimum / (step.target.chips * chip.flops)
    on_core = counted.core / chip.clock
    return {
        "seconds": step.expected,
        "on_core": on_core,
        "utilization": needed / step.expected,
        "utilization_on_core": needed / on_core,
        "samples_per_second": step.stage.data.examples / step.expected,
        "cycles": counted.core,
        "cycles_of_copies": counted.copies,
        "cycles_of_collectives": counted.links,
        "clock": chip.clock,
        "plain_product_cycles": step.plain,
        "plain_product_share": cycles.plain_share(step.plain, step.target),
        "places": {name: [number, round(share, 4)] for name, number, share in counted.most()},
        "operations": {
            name: [number, round(share, 4)] for name, number, share in counted.heaviest()
        },
    }


def text(step: Forecast, largest: Forecast | None, look: Look | None) -> str:
    """The page.

    Args:
      step: of the stage as it is configured.
      largest: of the largest micro-batch that fits, when it was searched.
      look: at the data, when it was taken.
    """
    lines = [f"{step.stage.name} on {step.target.title}, {step.target.chips} chips", ""]
    lines += _page(step)
    if largest is not None and largest is not step:
        lines += ["", "Largest micro-batch of the same update that fits:", "", *_page(largest)]
        lines += _gain(step, largest)
    if not step.fits:
        lines += [
            "",
            *_refused(step),
            "What takes most of a chip:",
            "",
            *_blame(step, largest),
        ]
    if look is not None:
        lines += ["", *_look(look)]
    return "\n".join(lines) + "\n"


def flags(step: Forecast) -> str:
    """What makes the micro-batch of a step, on the command line."""
    data, given = step.stage.data, {}
    if batch_format.find(data).packs:
        given["data.rows"] = data.rows
    given["data.examples"] = data.examples
    given["optimizer.accumulation"] = step.stage.optimizer.accumulation
    return " ".join(f"--config.{name}={value}" for name, value in given.items())


def _gain(step: Forecast, largest: Forecast) -> list[str]:
    """What the user gains by which flags, in one line."""
    found = speed(largest)
    if not (found and largest.compiled and largest.readable):
        return [f"with          {flags(largest)}"]
    rate = f"{found['samples_per_second']:.0f} samples/s at best"
    if step.fits:
        rate += f" instead of {speed(step)['samples_per_second']:.0f}"
    return [f"with          {flags(largest)}: {rate}"]


def _refused(step: Forecast) -> list[str]:
    """In words, whether the compiler or the arithmetic says so, and by how much."""
    excess = step.memory.total - step.capacity
    over = f"{gib(step.memory.total)} GiB a chip, {gib(excess)} too many."
    if not step.compiled:
        return [f"It does not fit by arithmetic: {over}"]
    lines = [f"It does not fit: the compiler wants {over}"]
    if step.kept:
        lines += [
            "It names no arrays; what autodiff keeps is listed with its shape over all chips."
        ]
    return lines


def _page(step: Forecast) -> list[str]:
    lines = [*_batch(step), *_memory(step), *_flops(step)]
    if not step.fits:
        return lines
    return [*lines, *_collectives(step), *_speed(step), *_forecast_lines(step)]


def _batch(step: Forecast) -> list[str]:
    data, mesh = step.stage.data, ", ".join(f"{a} {n}" for a, n in step.mesh.items())
    return [
        f"micro-batch   {micro_batch.rows(step.stage)} rows, {data.examples} examples, "
        f"{micro_batch.tokens(step.stage)} tokens; {step.stage.optimizer.accumulation} an update",
        f"mesh          {mesh}",
    ]


def _memory(step: Forecast) -> list[str]:
    used, held = step.memory, step.capacity
    parts = ", ".join(f"{name} {gib(size)}" for name, size in dataclasses.asdict(used).items())
    of = f" of {gib(held)}: {'fits' if step.fits else 'DOES NOT FIT'}" if held else ""
    how = "" if step.compiled else " (arithmetic, not compiled: what autodiff keeps, no kernels)"
    lines = [f"GiB per chip  {gib(used.total)}{of}{how}", f"              {parts}"]
    return lines + ([f"compiling     {step.seconds:.0f} s of one core"] if step.compiled else [])


def _flops(step: Forecast) -> list[str]:
    return [
        f"TFLOP a step  {step.flops / 1e12:.2f}, the stage needs {step.minimum / 1e12:.2f} "
        f"(x {step.flops / step.minimum:.3f})"
    ]


def _collectives(step: Forecast) -> list[str]:
    if not step.readable:
        return ["collectives   unknown, as is memory traffic: jaxlib cannot read this program"]
    lines = _moved("collectives", step.moved(between=False))
    if step.target.slices > 1:
        lines += _moved("of slices", step.moved(between=True))
    return lines


def _moved(title: str, found: list[Collective]) -> list[str]:
    """A line for each kind of collective."""
    return [
        f"{'' if number else title:13} {kind}: {row['count']:.0f}, "
        f"{row['bytes'] / 1e9:.3f} GB of results, {row['sent'] / 1e9:.3f} GB sent by a chip"
        for number, (kind, row) in enumerate(sorted(collectives.totals(found).items()))
    ]


def _speed(step: Forecast) -> list[str]:
    found = speed(step)
    if not found:
        return []
    return [
        f"at best       {found['seconds'] * 1e3:.1f} ms a micro-step, limited by {found['limit']} "
        f"(arithmetic {found['arithmetic'] * 1e3:.1f}, memory {found['memory'] * 1e3:.1f}, "
        f"links {found['links'] * 1e3:.1f}{_network(step, found['network'])})",
        f"              {found['samples_per_second']:.0f} samples/s, "
        f"{found['tokens_per_second']:.0f} tokens/s, "
        f"{100 * found['useful_share_of_peak']:.0f} % of peak on needed FLOPs",
        f"whole stage   {found['days']:.2f} days, {found['chip_hours']:.0f} chip-hours",
    ]


def _forecast_lines(step: Forecast) -> list[str]:
    """The compiler's cycles, and the places of the model that take most of them."""
    found = forecast(step)
    if not found:
        return []
    waits = "" if found["seconds"] == found["on_core"] else ", the rest waits for links"
    lines = [
        f"forecast      {found['seconds'] * 1e3:.1f} ms a micro-step, "
        f"{found['samples_per_second']:.0f} samples/s, {100 * found['utilization']:.0f} % of peak "
        "on needed FLOPs",
        f"              by the compiler's {found['cycles'] / 1e6:.1f} M cycles: "
        f"{found['on_core'] * 1e3:.1f} ms, "
        f"{100 * found['utilization_on_core']:.0f} % of peak{waits}",
    ]
    if found["plain_product_share"]:
        lines += [
            f"              (by such a count a product of {cycles.PLAIN} x {cycles.PLAIN} x "
            f"{cycles.PLAIN} reaches {100 * found['plain_product_share']:.0f} %)"
        ]
    shares = [f"{name} {100 * row[1]:.0f} %" for name, row in found["operations"].items()]
    lines += [f"              {', '.join(shares[:6])}"]
    return lines + [
        f"{'' if number else 'most cycles':13} {cycles_ / 1e6:8.2f} M  {100 * share:4.1f} %  {name}"
        for number, (name, (cycles_, share)) in enumerate(found["places"].items())
    ]


def _network(step: Forecast, seconds: float) -> str:
    """The time between slices, where there are several."""
    if step.target.slices == 1:
        return ""
    known = step.target.chip.network
    return f", between slices {seconds * 1e3:.1f}" if known else ", between slices not known"


def _blame(step: Forecast, largest: Forecast | None) -> list[str]:
    """The largest tensors: the compiler's, what autodiff keeps, or those of the batch that fits."""
    rows = [(f"parameter {path}", size) for path, size in step.parameters]
    known = step if step.temporaries or step.kept else largest
    if known is not None and known.temporaries:
        scale = micro_batch.rows(step.stage) / micro_batch.rows(known.stage)
        note = "" if scale == 1 else f" (of {micro_batch.rows(known.stage)} rows)"
        rows += [(f"temporary {name}{note}", size) for name, size in known.temporaries]
    rows += [(f"kept {name}", size) for name, size in step.kept]
    rows += [
        ("all temporaries", step.memory.temporaries),
        ("all optimizer", step.memory.optimizer),
    ]
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
    """Writes NAME.txt and NAME.json; each file is whole or not there.

    Args:
      directory: is made where it is not there.
      name: of both files.
      page: the text.
      plain: the same as plain data.
    """
    written = []
    for ending, content in (("txt", page), ("json", json.dumps(plain, indent=1, default=_plain))):
        written.append(Path(directory) / f"{name}.{ending}")
        atomic.write_text(written[-1], content)
    return written


def _plain(value: object) -> float | str:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else str(value)
