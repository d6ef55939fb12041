"""What devices send each other in one step: count and bytes of every kind of collective.

Between slices the TPU compiler writes no collectives: each slice has a program of its own, whose
collectives stay inside, and hands arrays to its hosts, which send them over the data center's
network. Elsewhere a collective leaves a slice when its groups do.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence

import numpy as np

from xllm_jax.preflight.hlo import Array, Instruction, Program

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
      groups: numbers of the devices that take part together; empty between a TPU's slices.
      between: whether it goes from slice to slice, over the data center's network.
    """

    kind: str
    shape: str
    size: int
    sent: float
    times: int
    in_loop: bool
    source: str
    groups: tuple[tuple[int, ...], ...] = ()
    between: bool = False


def find(program: Program, devices: int, slices: Sequence[int] = ()) -> list[Collective]:
    """Every collective of a compiled program.

    A TPU program splits a collective into several fused instructions that share one channel: they
    are one collective.

    Args:
      program: of one slice where a TPU's compiler made it, else of all of them.
      devices: how many run the program.
      slices: the slice of each of them, in the program's order; empty: all lie in one.
    """
    found: dict[str, Collective] = {}
    for computation, line, times in program.executed():
        for one in _inside(program, line):
            kind = _kind(one)
            if not kind:
                continue
            channel = re.search(r"channel_id=(\d+)", one.attributes)
            place = computation if channel is None else channel.group(1)
            name = f"{kind} {place} {one.name if channel is None else ''}"
            in_loop = computation != program.entry
            if one.operation == "recv":
                made = _of_hosts(one, kind, times, in_loop)
            else:
                made = _collective(one, kind, times, in_loop, devices)
                made = dataclasses.replace(made, between=_leaves(one, made, slices))
            if name not in found or found[name].times < times:
                found[name] = made
    return list(found.values())


def _kind(line: Instruction) -> str:
    """The kind of collective that an instruction is, or ''."""
    kind = line.operation.removesuffix("-start")
    if kind == "recv":
        named = re.search(r'_xla_megascale_transfer_type="(\w+)"', line.attributes)
        kind = named[1].lower().replace("_", "-") if named else ""
        return kind if kind in KINDS else kind and "collective-permute"
    return kind if kind in KINDS else ""


def _leaves(line: Instruction, made: Collective, slices: Sequence[int]) -> bool:
    """Whether devices of several slices take part together, or a permutation's pairs do."""
    pairs = re.search(r"source_target_pairs=\{(\{[\d,{}]+\})\}", line.attributes)
    groups = [_integers(one) for one in re.findall(r"\d[\d,]*", pairs[1])] if pairs else made.groups
    return any(len({slices[number] for number in group}) > 1 for group in groups if slices)


def _of_hosts(line: Instruction, kind: str, times: int, in_loop: bool) -> Collective:
    """What hosts of TPU slices exchange: one chip's part of it, with its namesakes elsewhere."""
    arrays = line.arrays[:-2]  # behind them stand a context and a token
    size = sum(array.size for array in arrays)
    target = re.search(r'_xla_megascale_target="?\{+([\d,]+)\}', line.attributes)
    sends = sent(kind, size, len(_integers(target[1])) if target else 2)
    return Collective(
        kind, _largest(arrays), size, sends, times, in_loop, line.source, between=True
    )


def _largest(arrays: Sequence[Array]) -> str:
    largest = max(arrays, key=lambda array: array.size)
    return f"{largest.kind}[{','.join(map(str, largest.shape))}]"


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
    together = tuple(map(tuple, groups(line.attributes, devices)))
    sends = sent(kind, size, len(together[0]))
    return Collective(kind, _largest(arrays), size, sends, times, in_loop, line.source, together)


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
    """Bytes that a device of a ring of `group` sends for a result of `size` bytes.

    Args:
      kind: operation of XLA, such as 'all-gather'.
      size: bytes of the result on a device.
      group: devices that take part.
    """
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
