"""How fast a step can be at best: arithmetic, main memory, links between chips, or the network."""

from __future__ import annotations

import dataclasses

from xllm_jax.preflight.hlo import Array, Instruction, Program
from xllm_jax.preflight.targets import Target

UNREAD = (
    "parameter", "get-tuple-element", "tuple", "while", "bitcast", "constant", "conditional",
    "call", "after-all", "partition-id", "iota",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of one micro-step on one chip, were each the only limit; 0 = not known.

    Attributes:
      arithmetic: the FLOPs that the step does, at the chip's peak.
      memory: bytes read and written, at the memory's bandwidth.
      links: bytes sent inside a slice, over all links.
      network: bytes sent to other slices, over the data center's network.
    """

    arithmetic: float
    memory: float
    links: float
    network: float = 0.0

    @property
    def seconds(self) -> float:
        """The longest of them: all perfectly overlapped."""
        return max(dataclasses.astuple(self))

    @property
    def limit(self) -> str:
        """Name of the longest."""
        times = dataclasses.asdict(self)
        return max(times, key=times.__getitem__)


def estimate(
    target: Target, flops: float, traffic: float, sent: float, between: float = 0.0
) -> Roofline:
    """The times.

    Args:
      target: the slices.
      flops: of the whole step over all chips.
      traffic, sent, between: bytes of one chip; sent inside its slice, and to other slices.
    """

    def over(amount: float, rate: float) -> float:
        return amount / rate if rate else 0.0

    chip = target.chip
    return Roofline(
        over(flops / target.chips, chip.flops),
        over(traffic, chip.bandwidth),
        over(sent, target.sends),
        over(between, chip.network),
    )


def traffic(program: Program) -> int:
    """Bytes that one chip reads from and writes to main memory in a step.

    Every instruction reads its operands and writes its result once; of a stack of layers that a
    loop takes one layer from, the layer counts and not the stack.
    """
    total = 0
    for computation, line, times in program.executed():
        if line.operation not in UNREAD and not line.operation.endswith("-done"):
            total += times * _moved(program, computation, line)
    return total


def _moved(program: Program, computation: str, line: Instruction) -> int:
    known = program.computations[computation]
    operands = [known[name] for name in line.operands if name in known]
    if line.operation in ("dynamic-slice", "slice", "gather", "slice-start"):
        return 2 * _slow(line.arrays[-2:][:1])
    if line.operation == "dynamic-update-slice":
        return 2 * _slow(operands[1].arrays) if len(operands) > 1 else 0
    inside = program.fused(line)
    if not inside:
        return _slow(line.arrays) + sum(_slow(operand.arrays) for operand in operands)
    read = sum(
        _read(program, inside, number, _slow(operand.arrays))
        for number, operand in enumerate(operands)
    )
    return read + _written(inside, line)


def _read(program: Program, inside: dict[str, Instruction], number: int, whole: int) -> int:
    """Bytes that a fusion reads of one operand: slices where it takes nothing but slices."""
    found = [
        one.name for one in inside.values() if one.operation == "parameter" and one.number == number
    ]
    names = set(found)  # and what is the same array in another shape
    for one in inside.values():
        if one.operation in ("bitcast", "reshape") and names & set(one.operands):
            names.add(one.name)
    users = [one for one in inside.values() if one.name not in names and names & set(one.operands)]
    return min(whole, sum(_used(program, one, names, whole) for one in users))


def _used(program: Program, user: Instruction, names: set[str], whole: int) -> int:
    """Bytes that one instruction of a fusion reads of the array with these names."""
    if user.operation in ("dynamic-slice", "slice", "gather"):
        return user.size
    if user.operation == "dynamic-update-slice" and user.operands[0] in names:
        return 0
    inside = program.fused(user)
    if not inside:
        return whole
    places = [number for number, operand in enumerate(user.operands) if operand in names]
    return sum(_read(program, inside, number, whole) for number in places)


def _written(inside: dict[str, Instruction], line: Instruction) -> int:
    """Bytes that a fusion writes: of an update in place, what is new."""
    updates = [one for one in inside.values() if one.operation == "dynamic-update-slice"]
    if updates and _slow(line.arrays):
        new = [inside[one.operands[1]].size for one in updates if one.operands[1] in inside]
        return min(sum(new), _slow(line.arrays))
    if any(one.operation.startswith(("all-", "reduce-scatter")) for one in inside.values()):
        return _slow(line.arrays[:1])  # the other results are buffers handed through
    return _slow(line.arrays)


def _slow(arrays: tuple[Array, ...]) -> int:
    """Bytes of those arrays that lie in main memory."""
    return sum(array.size for array in arrays if not array.fast)
