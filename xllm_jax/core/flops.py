"""FLOPs of the matrix products and convolutions of a traced function, loops multiplied out.

2 per multiply-add; everything elementwise is left out, as the minimum leaves it out. The counts are
those of the whole (global) program: a mesh that splits all of it does them once in all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import jax
from jax.extend import core
from jax.interpreters import partial_eval

from xllm_jax.core import prng, rules
from xllm_jax.core.batch import B
from xllm_jax.core.types import Metrics, Params

Atom = core.Var | core.Literal

PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot")


def typed(variable: Atom) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a variable that holds an array."""
    return cast(jax.ShapeDtypeStruct, variable.aval)


def of_product(equation: core.JaxprEqn) -> float:
    """FLOPs of one product: twice its result's size times what is summed for each entry."""
    left, right = (typed(variable).shape for variable in equation.invars[:2])
    result = math.prod(typed(equation.outvars[0]).shape)
    if equation.primitive.name == "dot_general":
        (summed, _), _ = equation.params["dimension_numbers"]
        return 2.0 * result * math.prod(left[axis] for axis in summed)
    if equation.primitive.name == "conv_general_dilated":
        outputs = right[equation.params["dimension_numbers"].rhs_spec[0]]
        return 2.0 * result * math.prod(right) / outputs
    raise NotImplementedError(f"no count for {equation.primitive.name}")


def inner(equation: core.JaxprEqn) -> Iterator[core.Jaxpr]:
    """The programs inside an equation: loop bodies, branches, called functions."""
    for value in equation.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item


def measured(function: Callable[..., object], *arguments: object) -> float:
    """FLOPs that `function`, jitted or not, does on arrays of these shapes, dead code left out."""
    # Traced as it is: a jitted function with options of the compiler may not lie in another.
    jitted = function if hasattr(function, "trace") else jax.jit(function)
    return of_trace(jitted.trace(*arguments))


def of_trace(traced: jax.stages.Traced) -> float:
    """FLOPs of a jitted function's trace, dead code left out."""
    jaxpr = traced.jaxpr.jaxpr
    alive, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _measured(alive)


def _measured(jaxpr: core.Jaxpr) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name in PRODUCTS:
            total += of_product(equation)
        counts = [_measured(part) for part in inner(equation)]
        if counts:
            times = equation.params["length"] if name == "scan" else 1
            total += times * (max(counts) if name == "cond" else sum(counts))
    return total


def minimum(function: Callable[..., object], trainable: Params, *others: object) -> float:
    """FLOPs that the gradient of `function(trainable, *others)` cannot do without.

    Every product of the forward pass counts once, and once more for each factor that depends on
    what trains, since its gradient is another product of the same size: 2 FLOPs per multiply-add of
    a frozen encoder, 4 where the gradient passes through a frozen layer, 6 in a trained one.
    Nothing is computed twice.
    """
    jaxpr = jax.make_jaxpr(function)(trainable, *others).jaxpr
    count = len(jax.tree.leaves(trainable))
    depends = [number < count for number in range(len(jaxpr.invars))]
    return _minimum(jaxpr, depends)[0]


def useful(
    loss: Callable[[Params, B, jax.Array], tuple[jax.Array, Metrics]],
    trainable: Params,
    frozen: Params,
    batch: B,
) -> float:
    """`minimum` of a stage's loss (params, batch, key) -> (scalar, metrics); shapes are enough.

    Args:
      loss: (params, batch, key) -> (scalar, metrics).
      trainable, frozen: the parameter halves, or their shapes.
      batch: arrays or shapes.
    """

    def value(trainable: Params, frozen: Params, batch: B, key: jax.Array) -> jax.Array:
        return loss(rules.join(trainable, frozen), batch, key)[0]

    key = jax.eval_shape(lambda: prng.key(0))
    return minimum(value, trainable, frozen, batch, key)


def _minimum(jaxpr: core.Jaxpr, depends: Sequence[bool]) -> tuple[float, list[bool]]:
    """(FLOPs, which results depend on what trains) of one program."""
    known = dict(zip(jaxpr.invars, depends))

    def look(variable: Atom) -> bool:
        return not isinstance(variable, core.Literal) and known.get(variable, False)

    total = 0.0
    for equation in jaxpr.eqns:
        inputs = [look(variable) for variable in equation.invars]
        flops, outputs = _equation(equation, inputs)
        total += flops
        for variable, output in zip(equation.outvars, outputs):
            known[variable] = output and jax.numpy.issubdtype(
                typed(variable).dtype, jax.numpy.inexact
            )
    return total, [look(variable) for variable in jaxpr.outvars]


def _equation(equation: core.JaxprEqn, inputs: list[bool]) -> tuple[float, list[bool]]:
    name = equation.primitive.name
    if name in PRODUCTS:
        return of_product(equation) * (1 + sum(inputs[:2])), [any(inputs)]
    if name == "stop_gradient":
        return 0.0, [False] * len(equation.outvars)
    parts = list(inner(equation))
    if name == "scan":
        return _scan(equation, parts[0], inputs)
    if name == "while":
        return 0.0, [any(inputs)] * len(equation.outvars)
    if name == "cond":
        found = [_minimum(part, inputs[1:]) for part in parts]
        outputs = [any(column) for column in zip(*(row[1] for row in found))]
        return max(row[0] for row in found), outputs
    if parts:
        return _minimum(parts[0], inputs[-len(parts[0].invars) :])
    return 0.0, [any(inputs)] * len(equation.outvars)


def loop_sizes(equation: core.JaxprEqn) -> tuple[int, int]:
    """(constants, carried values) of a scan, which its inputs start with.

    Read off the shapes: jax 0.10 and 0.11 keep the numbers in different places. What is taken or
    stacked turn by turn has one axis more outside of the body than inside.
    """
    body = equation.params["jaxpr"].jaxpr

    def same(outside: Sequence[Atom], inside: Sequence[Atom]) -> int:
        return sum(typed(a).ndim == typed(b).ndim for a, b in zip(outside, inside))

    carried = same(equation.outvars, body.outvars)
    return same(equation.invars, body.invars) - carried, carried


def _scan(
    equation: core.JaxprEqn, body: core.Jaxpr, inputs: list[bool]
) -> tuple[float, list[bool]]:
    """A loop whose carry depends on what trains from some turn on counts as if from the first."""
    constants, carried = loop_sizes(equation)
    while True:
        flops, outputs = _minimum(body, inputs)
        grown = [a or b for a, b in zip(inputs[constants : constants + carried], outputs)]
        if grown == inputs[constants : constants + carried]:
            return equation.params["length"] * flops, outputs
        inputs = [*inputs[:constants], *grown, *inputs[constants + carried :]]
