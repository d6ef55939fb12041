"""The cycles that the TPU compiler itself expects of every instruction it wrote: a forecast.

The compiler states `estimated_cycles` in the text of its programs, loops once. Here a loop's body
counts as often as it runs. Copies and collectives that run beside the core's own work are counted
apart: the core may or may not wait for them. Only a TPU's program has such counts.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from xllm_jax.preflight import collectives, hlo
from xllm_jax.preflight.hlo import Instruction, Program
from xllm_jax.preflight.targets import Target, devices

PLAIN = 8192  # rows and columns of the product that stands for what the compiler thinks possible
UNNAMED = "outside of modules"
CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
# Layers of tracing around a module's name; the last part of a name is its primitive.
DULL = re.compile(
    r"(jit|pjit|shard_map|custom_vjp|custom_jvp|remat)\(.*\)|while|body|cond|branch_\d+_fun"
    r"|closed_call|checkpoint|rematted_computation|custom_(vjp|jvp)_call|pjit|scan|core_call"
)
# What a fusion may hold beside a collective without computing anything.
IDLE = ("fusion", "parameter", "constant", "tuple", "get-tuple-element", "bitcast")
WRAPPED = re.compile(r"(transpose|jvp|vmap)\((.*)\)")


@dataclasses.dataclass(frozen=True)
class Cycles:
    """What one chip does in one micro-step, in cycles of its clock.

    Attributes:
      core: of the instructions that the core itself runs.
      copies: of asynchronous copies, beside the core.
      links: of collectives, as far as the compiler states any.
      places: {module path, with 'backward' behind it in the gradient: cycles of the core}.
      operations: {primitive of JAX: cycles of the core}.
    """

    core: int
    copies: int
    links: int
    places: dict[str, int]
    operations: dict[str, int]

    def most(self, count: int = 10) -> list[tuple[str, int, float]]:
        """(module path, cycles, share of the core's) of the places that take most."""
        return _most(self.places, self.core, count)

    def heaviest(self, count: int = 10) -> list[tuple[str, int, float]]:
        """(primitive, cycles, share of the core's) of the operations that take most."""
        return _most(self.operations, self.core, count)


def _most(found: dict[str, int], total: int, count: int) -> list[tuple[str, int, float]]:
    rows = sorted(found.items(), key=lambda row: (-row[1], row[0]))[:count]
    return [(name, cycles, cycles / max(total, 1)) for name, cycles in rows]


def count(program: Program) -> Cycles | None:
    """Adds up the cycles of a compiled program; None where it states none.

    Args:
      program: of one chip.
    """
    places, operations = Counter[str](), Counter[str]()
    core = copies = links = 0
    for _, line, times in program.executed():
        cycles = times * stated(line)
        if not cycles:
            continue
        inside = list(program.fused(line).values())
        if _crosses(line, inside):
            links += cycles
        elif line.operation.endswith(("-start", "-done")):
            copies += cycles
        else:
            core += cycles
            source = _source(line, inside)
            places[place(source)] += cycles
            operations[source.rpartition("/")[2] or line.operation] += cycles
    if not core:
        return None
    return Cycles(core, copies, links, dict(places), dict(operations))


def stated(line: Instruction) -> int:
    """Cycles that the compiler states of one instruction, run once; 0 where it states none."""
    found = CYCLES.search(line.attributes)
    return int(found.group(1)) if found else 0


def _crosses(line: Instruction, inside: Iterable[Instruction]) -> bool:
    """Whether an instruction does nothing but send to other chips.

    The TPU compiler also hides a part of a gathering in a fusion that computes: that is the core's.
    """
    kinds = {line.operation.removesuffix("-start").removesuffix("-done")}
    kinds |= {one.operation for one in inside}
    return bool(kinds.intersection(collectives.KINDS)) and kinds.issubset(
        {*collectives.KINDS, *IDLE}
    )


def _source(line: Instruction, inside: list[Instruction]) -> str:
    """Name of an instruction in the model: its own, or that of what it fuses, from the end on."""
    named = [line.source, *(one.source for one in reversed(inside))]
    return next((source for source in named if "/" in source), line.source)


def place(source: str) -> str:
    """Module path of an operation's name, such as 'Causal/layers/attention backward'.

    Args:
      source: `op_name` of the program's text.
    """
    parts, backward = [], False
    for part in source.split("/")[:-1]:
        while found := WRAPPED.fullmatch(part):
            backward |= found.group(1) == "transpose"
            part = found.group(2)
        backward |= part == "rematted_computation"  # runs for the gradient
        if part and "->" not in part and not DULL.fullmatch(part):  # an arrow: an einsum's name
            parts.append(part)
    path = "/".join(parts) or UNNAMED
    return f"{path} backward" if backward else path


def plain(target: Target) -> int:
    """Cycles of one 8192 x 8192 x 8192 product in bfloat16 by the same compiler; 0 if not stated.

    Such a product is what a chip does best, so that its share of the peak says how far the
    compiler's count can be believed.

    Args:
      target: TPU slice; its compiler must be installed.
    """
    mesh = Mesh(devices(target)[:1], "x")
    side = jax.ShapeDtypeStruct(
        (PLAIN, PLAIN), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec())
    )
    compiled = jax.jit(lambda a, b: a @ b).lower(side, side).compile()
    found = count(hlo.parse(compiled.as_text() or ""))
    return found.core if found else 0


def plain_share(cycles: int, target: Target) -> float:
    """Share of the chip's peak that such a product reaches by its cycles; 0 if not known."""
    chip = target.chip
    if not cycles or not chip.clock:
        return 0.0
    return 2.0 * PLAIN**3 / (cycles / chip.clock * chip.flops)
