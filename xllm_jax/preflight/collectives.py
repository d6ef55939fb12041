"""What devices send each other in one step: count and bytes of every kind of collective."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

from xllm_jax.preflight.hlo import Instruction, Program

KINDS = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
    "ragged-all-to-all", "collective-broadcast",
)  # fmt: skip


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
    """

    kind: str
    shape: str
    size: int
    sent: float
    times: int
    in_loop: bool
    source: str


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
    group = group_size(line.attributes, devices)
    return Collective(kind, shape, size, sent(kind, size, group), times, in_loop, line.source)


def group_size(attributes: str, devices: int) -> int:
    """Devices that take part in one collective together."""
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
    if listed:
        return listed.group(1).count(",") + 1
    tiled = re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes)
    if tiled:
        return int(tiled.group(2))
    named = re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", attributes)
    if named:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named.group(1)))
        group = 1
        for axis in re.findall(r"'(\w+)'", named.group(2)):
            group *= int(sizes.get(axis, 1))
        return group
    return devices


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
