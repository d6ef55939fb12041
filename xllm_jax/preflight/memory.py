"""Bytes on one chip: parameters, optimizer, batch, and what the compiler needs besides them."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

import jax
import numpy as np
from jax.extend import core

from xllm_jax.core import flops, mesh, rules
from xllm_jax.core.batch import B, Batch
from xllm_jax.core.types import Params
from xllm_jax.preflight.hlo import Program
from xllm_jax.training.step import Loss, TrainState

Kept = tuple[str, tuple[int, ...], np.dtype]  # operation, shape over all chips, dtype


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one chip.

    Attributes:
      trainable, frozen, optimizer, batch: arguments of the step.
      temporaries: activations, gathered parameters and everything else inside the step.
      program: its code.
    """

    trainable: int
    frozen: int
    optimizer: int
    batch: int
    temporaries: int
    program: int = 0

    @property
    def total(self) -> int:
        """All of it; the new state takes the buffers of the old one."""
        return sum(dataclasses.astuple(self))


def per_chip(leaf: jax.ShapeDtypeStruct) -> int:
    """Bytes of one array on one chip, by its sharding; none where it stays with the host."""
    if leaf.sharding.memory_kind == mesh.HOST:
        return 0
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def held(tree: object) -> int:
    """Bytes of all arrays of a tree on one chip."""
    return sum(per_chip(leaf) for leaf in jax.tree.leaves(tree))


def account(state: TrainState, batch: Batch, temporaries: int, program: int = 0) -> Memory:
    """The account of a step from its arguments' shardings and what the compiler said.

    Args:
      state, batch: the arguments, with their shardings.
      temporaries: bytes on a chip that the step needs besides.
      program: bytes of its code.
    """
    return Memory(
        held(state.trainable),
        held(state.frozen),
        held(state.optimizer),
        held(batch),
        temporaries,
        program,
    )


def kept(loss: Loss[B], trainable: Params, frozen: Params, batch: B, key: jax.Array) -> list[Kept]:
    """What the backward pass needs from the forward pass: (operation, shape over all chips, dtype).

    The arithmetic for chips that nothing is compiled for: what autodiff keeps, without what the
    kernels need while they run, and without parameters and batch, which are there anyway.

    Args:
      loss: (params, batch, key) -> (scalar, metrics).
      trainable, frozen, batch, key: its arguments, shapes only.
    """

    def pullback(
        trainable: Params, frozen: Params, batch: B, key: jax.Array
    ) -> Callable[[jax.Array], tuple[Params]]:
        return jax.vjp(lambda t: loss(rules.join(t, frozen), batch, key)[0], trainable)[1]

    jaxpr = jax.make_jaxpr(pullback)(trainable, frozen, batch, key).jaxpr
    arguments = Counter(
        (leaf.shape, leaf.dtype) for leaf in jax.tree.leaves((trainable, frozen, batch))
    )
    found = []
    for variable in jaxpr.outvars:
        kind = flops.typed(variable)
        shape, dtype = kind.shape, kind.dtype
        if arguments[shape, dtype] > 0:
            arguments[shape, dtype] -= 1
        else:
            found.append((short(_origin(jaxpr, variable)), shape, dtype))
    return found


def residuals(found: Iterable[Kept]) -> int:
    """Bytes of what is `kept`, over all chips."""
    return sum(_size(shape, dtype) for _, shape, dtype in found)


def largest_kept(found: Iterable[Kept], chips: int, count: int) -> list[tuple[str, int]]:
    """The largest of what is `kept`: ('shape over all chips, operation', bytes on one chip).

    Args:
      found: what `kept` gives.
      chips: over which it is split.
      count: how many are listed.
    """
    sizes = {
        f"{dtype}[{','.join(map(str, shape))}] {name}".strip(): _size(shape, dtype) // chips
        for name, shape, dtype in found
    }
    return sorted(sizes.items(), key=lambda row: -row[1])[:count]


def _size(shape: tuple[int, ...], dtype: np.dtype) -> int:
    return math.prod(shape) * getattr(dtype, "itemsize", 4)


def _origin(jaxpr: core.Jaxpr, variable: flops.Atom) -> str:
    """Name of the operation in the model that makes a result, in the innermost loop or call."""
    for equation in jaxpr.eqns:
        if variable in equation.outvars:
            place = equation.outvars.index(variable)
            name = str(equation.source_info.name_stack)
            for part in flops.inner(equation):
                if place < len(part.outvars) and not isinstance(part.outvars[place], core.Literal):
                    inside = _origin(part, part.outvars[place])
                    return "/".join(filter(None, (name, inside)))
            return f"{name}/{equation.primitive.name}" if name else equation.primitive.name
    return ""


def largest_parameters(state: TrainState, count: int) -> list[tuple[str, int]]:
    """The parameters that take most of a chip: (path, bytes)."""
    flat = {path: per_chip(x) for half in (state.trainable, state.frozen)
            for path, x in rules.flatten(half).items()}  # fmt: skip
    return sorted(flat.items(), key=lambda row: -row[1])[:count]


def largest_temporaries(program: Program, count: int) -> list[tuple[str, int]]:
    """The largest arrays that the step makes in main memory: ('shape of operation', bytes)."""
    skipped = ("parameter", "get-tuple-element", "tuple", "while", "bitcast", "constant")
    found: dict[str, int] = {}
    for _, line, _ in program.executed():
        if line.operation in skipped or line.operation.endswith("-done"):
            continue
        for array in line.arrays:
            if not array.fast:
                shape = f"{array.kind}[{','.join(map(str, array.shape))}]"
                found[f"{shape} {short(line.source)}".strip()] = array.size
    return sorted(found.items(), key=lambda row: -row[1])[:count]


def short(source: str) -> str:
    """An operation's name without the layers of tracing around it."""
    dull = re.compile(r"jit\(.*\)|while|body|closed_call|checkpoint|rematted_computation")
    return "/".join(part for part in source.split("/") if not dull.fullmatch(part))


def as_dict(memory: Memory) -> Mapping[str, int]:
    """For JSON."""
    return dataclasses.asdict(memory) | {"total": memory.total}
