"""Where a computation first makes a NaN: operation after operation, in order.

Each operation of the traced function runs by itself and its results are looked at; in a loop, a
branch or a called function that goes wrong the search goes on inside. That is slow, and is meant
for one micro-batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from xllm_jax.core import flops

HERE = str(Path(__file__).parents[1])  # the package
Array = jax.Array | np.ndarray
Test = Callable[[Array], bool]


def first(function: Callable[..., object], *arguments: object) -> str:
    """The first operation whose inputs are good and whose result is not, in words.

    A NaN is looked for first. Without one, the first infinity is named; some infinities are meant
    (the logarithm of a probability zero), so it need not be the culprit.

    Args:
      function: of arrays; gradients may be in it.
      arguments: pytrees of arrays.

    Returns:
      Such as 'log of llm/layers (models/glm.py:120) in turn 3 of 28 in scan of llm: NaN', or ''
      where all is finite.
    """
    closed = jax.make_jaxpr(function)(*arguments)
    leaves = jax.tree.leaves(arguments)
    for test, name in ((_has_nan, "NaN"), (_has_infinity, "infinity")):
        if any(map(test, leaves)):
            return f"an argument holds {name}"
        places = _search(closed.jaxpr, closed.consts, leaves, test)
        if places:
            return f"{' in '.join(reversed(places))}: {name}"
    return ""


def values(tree: object) -> dict[str, tuple[int, ...]]:
    """{path: index of the first value that is no finite number} of the arrays that hold one."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if _has_nan(leaf) or _has_infinity(leaf):
            wrong = jnp.argwhere(~jnp.isfinite(leaf), size=1)[0]
            found[jax.tree_util.keystr(path)] = tuple(map(int, wrong))
    return found


def _search(
    jaxpr: core.Jaxpr, consts: Sequence[Array], arguments: Sequence[Array], test: Test
) -> list[str]:
    """Places from the outermost to the innermost; nothing when all results are good."""
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments]))
    left = Counter(v for e in jaxpr.eqns for v in e.invars if not isinstance(v, core.Literal))
    left.update(v for v in jaxpr.outvars if not isinstance(v, core.Literal))
    for equation in jaxpr.eqns:
        inputs = [v.val if isinstance(v, core.Literal) else known[v] for v in equation.invars]
        results = _run(jaxpr, equation, inputs)
        if any(map(test, results)) and not any(map(test, inputs)):
            return [_place(equation), *_inside(equation, inputs, test)]
        known.update(zip(equation.outvars, results))
        for variable in equation.invars:  # at the real size not everything fits into memory
            if not isinstance(variable, core.Literal):
                left[variable] -= 1
                if not left[variable]:
                    del known[variable]
    return []


def _run(jaxpr: core.Jaxpr, equation: core.JaxprEqn, inputs: Sequence[Array]) -> list[Array]:
    """Results of one equation of `jaxpr`, run by itself."""
    pairs = zip(equation.invars, inputs)
    given = {v: value for v, value in pairs if not isinstance(v, core.Literal)}
    alone = jaxpr.replace(
        constvars=[],
        invars=list(given),
        outvars=list(equation.outvars),
        eqns=[equation],
        effects=equation.effects,
        debug_info=jaxpr.debug_info.with_unknown_names(),
    )
    return core.jaxpr_as_fun(core.ClosedJaxpr(alone, ()))(*given.values())


def _inside(equation: core.JaxprEqn, inputs: Sequence[Array], test: Test) -> list[str]:
    parts, name = list(flops.inner(equation)), equation.primitive.name
    if name == "scan":
        return _inside_loop(equation, inputs, test)
    if name == "cond":
        branch = equation.params["branches"][int(inputs[0])]
        return _search(branch.jaxpr, branch.consts, inputs[1:], test)
    if name == "while":
        return []
    for part in parts:
        if len(part.invars) == len(inputs) and not part.constvars:
            return _search(part, (), inputs, test)
    return []


def _inside_loop(equation: core.JaxprEqn, inputs: Sequence[Array], test: Test) -> list[str]:
    """The first turn of a scan that goes wrong, and the place in it."""
    settings, body = equation.params, equation.params["jaxpr"]
    constants, carried = flops.loop_sizes(equation)
    fixed, carry = inputs[:constants], inputs[constants : constants + carried]
    call = jax.jit(core.jaxpr_as_fun(body))
    for turn in _turns(settings["length"], settings["reverse"]):
        rows = [x[turn] for x in inputs[constants + carried :]]
        results = call(*fixed, *carry, *rows)
        if any(map(test, results)):
            found = _search(body.jaxpr, body.consts, [*fixed, *carry, *rows], test)
            return [f"turn {turn} of {settings['length']}", *found]
        carry = results[:carried]
    return []


def _turns(length: int, reverse: bool) -> Iterator[int]:
    yield from reversed(range(length)) if reverse else range(length)


def _place(equation: core.JaxprEqn) -> str:
    """The operation, the module it stands in, and the line of ours that made it."""
    source = equation.source_info
    stack = str(source.name_stack)
    frames = source.traceback.frames if source.traceback else []
    ours = [f for f in frames if f.file_name.startswith(HERE) and f.file_name != __file__]
    place = f" ({Path(ours[0].file_name).relative_to(HERE)}:{ours[0].line_num})" if ours else ""
    return equation.primitive.name + (f" of {stack}" if stack else "") + place


def _has_nan(x: Array) -> bool:
    return _inexact(x) and bool(jnp.isnan(x).any())


def _has_infinity(x: Array) -> bool:
    return _inexact(x) and bool(jnp.isinf(x).any())


def _inexact(x: Array) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)
