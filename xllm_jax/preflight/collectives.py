"""What devices send each other in one step: count and bytes of every kind of collective."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

from xllm_jax.preflight.hlo import Instruction, Program

KINDS = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
    "ragged-all-to-all", "collective-broadcast",
)  # fmt: skip

# '[2,4]T(1,0)': numbers from 0 on in this shape, axes exchanged.
_ROW = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the program.

    Attributes:
      kind: one of KINDS.
      shape: the largest array of its result, such as 'bf16[4096,16384]'.
      size: bytes of its result on one device.
      sent: bytes that one device sends each time (ring algorithms).
      times: how often it runs in a step.
      in_loop: whether it stands in the body of a loop.
      source: name of the operation in the model.
      groups: numbers of the devices that take part together.
    """

    kind: str
    shape: str
    size: int
    sent: float
    times: int
    in_loop: bool
    source: str
    groups: tuple[tuple[int, ...], ...] = ()


def find(program: Program, devices: int) -> list[Collective]:
    """Every collective of a compiled program.

    A TPU program splits a collective into several fused instructions that share one channel: they
    are one collective.
    """
    found: dict[str, Collective] = {}
    for computation, line, times in program.executed():
        for one in _inside(program, line):
            kind = one.operation.removesuffix("-start")
            if kind not in KINDS:
                continue
            channel = re.search(r"channel_id=(\d+)", one.attributes)
            place = computation if channel is None else channel.group(1)
            name = f"{kind} {place} {one.name if channel is None else ''}"
            made = _collective(one, kind, times, computation != program.entry, devices)
            if name not in found or found[name].times < times:
                found[name] = made
    return list(found.values())


def _inside(program: Program, line: Instruction) -> Iterator[Instruction]:
    yield line
    yield from program.fused(line).values()


def _collective(
    line: Instruction, kind: str, times: int, in_loop: bool, devices: int
) -> Collective:
    arrays = line.arrays
    if line.operation.endswith("-start"):  # operands and results stand side by side
        arrays = [array for array in arrays if array.shape][-1:]
    size = sum(array.size for array in arrays)
    largest = max(arrays, key=lambda array: array.size)
    shape = f"{largest.kind}[{','.join(map(str, largest.shape))}]"
    together = tuple(map(tuple, groups(line.attributes, devices)))
    sends = sent(kind, size, len(together[0]))
    return Collective(kind, shape, size, sends, times, in_loop, line.source, together)


def group_size(attributes: str, devices: int) -> int:
    """Devices that take part in one collective together."""
    return len(groups(attributes, devices)[0])


def groups(attributes: str, devices: int) -> list[list[int]]:
    """Numbers of the devices that take part in one collective together, group by group.

    XLA lists them, or says how to cut the row of all devices, or names axes of a mesh. What it says
    of other operations (a permutation has pairs) is one group of all.
    """
    listed = re.search(r"replica_groups=\{(\{[\d,{}]+\})\}", attributes)
    if listed:
        return [_integers(one) for one in re.findall(r"\d[\d,]*", listed[1])]
    tiled = re.search(rf"replica_groups=\[([\d,]+)\]<={_ROW}", attributes)
    if tiled:
        return _row(*tiled.groups()[1:]).reshape(_integers(tiled[1])).tolist()
    named = re.search(
        rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({_ROW}\))? ?\{{([^}}]*)\}}", attributes
    )
    return _of_mesh(*named.groups()) if named else [list(range(devices))]


def _row(shape: str, order: str | None) -> np.ndarray:
    numbers = np.arange(math.prod(_integers(shape))).reshape(_integers(shape))
    return numbers.transpose(_integers(order)) if order else numbers


def _of_mesh(axes: str, row: str | None, order: str | None, together: str) -> list[list[int]]:
    """Groups along axes such as `'a'`, or `'a':(2)4`, the 4 parts of 'a' inside its first 2."""
    parts = {name: (int(pre), int(size)) for name, pre, size in
             re.findall(r"'(\w+)':\((\d+)\)(\d+)", together)}  # fmt: skip
    wanted, shape, grouped = re.findall(r"'(\w+)'", together), [], []
    for name, length in re.findall(r"'(\w+)'=(\d+)", axes):
        before, size = parts.get(name, (1, int(length)))
        if name in wanted:
            grouped.append(len(shape) + 1)
        shape += [before, size, int(length) // (before * size)]
    numbers = _row(row, order) if row else np.arange(math.prod(shape))
    numbers = np.moveaxis(numbers.reshape(shape), grouped, range(-len(grouped), 0))
    return numbers.reshape(-1, math.prod(shape[axis] for axis in grouped)).tolist()


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def sent(kind: str, size: int, group: int) -> float:
    """Bytes that a device of a ring of `group` sends for a result of `size` bytes."""
    share = (group - 1) / group
    factors = {"all-gather": share, "all-reduce": 2 * share, "reduce-scatter": group - 1}
    return size * factors.get(kind, share if kind != "collective-permute" else 1.0)


def totals(found: list[Collective]) -> dict[str, dict[str, float]]:
    """{kind: {'count', 'bytes' of results, 'sent' by a device}} of one step."""
    table: dict[str, dict[str, float]] = {}
    for one in found:
        row = table.setdefault(one.kind, {"count": 0, "bytes": 0, "sent": 0.0})
        row["count"] += one.times
        row["bytes"] += one.times * one.size
        row["sent"] += one.times * one.sent
    return table
