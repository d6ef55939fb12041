"""Checks of a network's parameters: gradients, sharding rows, meshes, files, bfloat16."""

from __future__ import annotations

import math
import re
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from xllm_jax.conformance.bench import Bench, Outcome
from xllm_jax.conformance.outcome import Check, Failed, NotApplicable, close
from xllm_jax.convert import export_tree, import_tree
from xllm_jax.core import checkpoint, mesh, rules
from xllm_jax.core.errors import UserError
from xllm_jax.core.types import Flat, Params

DEVICES = 8
MESH = {"data": 2, "fsdp": 2, "tensor": 2}
OTHER_MESH = {"data": 1, "fsdp": 4, "tensor": 2}
PART = "network"


def gradients(bench: Bench) -> str:
    """Every parameter has a finite gradient, and those that never learn have none."""
    found = rules.flatten(bench.plain.parameters)
    for path, x in found.items():
        if not np.isfinite(x).all():
            raise Failed(f"the gradient of {path} is not finite")
    still = [p for p in found if any(re.fullmatch(s, p) for s in bench.subject.still)]
    dead = [path for path, x in found.items() if not x.any() and path not in still]
    if dead:
        raise Failed(f"{dead[0]} has no gradient ({len(dead)} of {len(found)} parameters)")
    rules.check_used(bench.subject.still, found, what="still")
    if not still:
        return f"{len(found)} parameters"
    moved = [path for path, x in _training(bench, still).items() if x.any()]
    if moved:
        raise Failed(f"{moved[0]} never learns, and has a gradient in training")
    return f"{len(found) - len(still)} parameters learn, {len(still)} do not"


def _training(bench: Bench, still: list[str]) -> dict[str, np.ndarray]:
    """Gradients of the parameters that never learn, in training."""
    network, inputs = bench.network, bench.inputs[:-1]
    keys = {"dropout": jax.random.key(0)}

    def loss(some: Flat, others: Flat) -> jax.Array:
        params = rules.join(rules.unflatten(some), rules.unflatten(others))
        states = network.apply({"params": params}, *inputs, train=True, rngs=keys)[0]
        return jnp.square(states.astype(jnp.float32)).sum()

    flat = rules.flatten(bench.params)
    some = {path: x for path, x in flat.items() if path in still}
    others = {path: x for path, x in flat.items() if path not in still}
    return jax.tree.map(np.asarray, jax.jit(jax.grad(loss))(some, others))


def sharding_rows(bench: Bench) -> str:
    """Each parameter has a row of SHARDING that fits its shape, and each row is for one."""
    table, unused = bench.subject.sharding, bench.subject.unused
    flat = rules.flatten(bench.params)
    rows = {path: rules.first_match(table, path) for path in flat}
    missing = [path for path, row in rows.items() if row is None]
    if missing:
        raise Failed(f"no row matches {missing[0]} ({len(missing)} of {len(flat)} parameters)")
    for number, (pattern, _) in enumerate(table):
        used = number in rows.values()
        if not used and pattern not in unused:
            shadowed = any(re.fullmatch(pattern, path) for path in flat)
            why = "an earlier row takes them all" if shadowed else "matches no parameter"
            raise Failed(f"row {pattern!r} is not used: {why}")
        if used and pattern in unused:
            raise Failed(f"row {pattern!r} is used, and was named as unused")
    for path, row in rows.items():
        _fits(path, table[row or 0][1], flat[path].shape)
    return f"{len(table)} rows, {len(flat)} parameters"


def _fits(path: str, spec: PartitionSpec, shape: tuple[int, ...]) -> None:
    """Raises Failed where a PartitionSpec is no way to split a parameter."""
    if len(spec) > len(shape):
        raise Failed(f"{path} has {len(shape)} axes, and its row {len(spec)} entries: {spec}")
    entries = [entry for entry in spec if entry is not None]
    axes = [a for entry in entries for a in (entry if isinstance(entry, tuple) else (entry,))]
    for axis in axes:
        if axis not in mesh.AXES:
            raise Failed(f"{path}: there is no axis {axis!r}, only {', '.join(mesh.AXES)}")
    if len(axes) > len(set(axes)):
        raise Failed(f"{path} is split along one axis twice: {spec}")


def _placed(bench: Bench, axes: dict[str, int]) -> tuple[jax.sharding.Mesh, Params]:
    """A mesh and the parameters on it."""
    if len(jax.devices()) < DEVICES:
        raise NotApplicable(f"{len(jax.devices())} devices here, it takes {DEVICES}")
    made = mesh.make(axes, jax.devices()[:DEVICES])
    try:
        specs = rules.assign(bench.subject.sharding, bench.params, total=False)
        return made, mesh.parameter_shardings(made, specs, bench.params)
    except (UserError, KeyError, ValueError) as error:
        raise NotApplicable(f"see sharding rows ({error})") from error


def sharded(bench: Bench) -> str:
    """Results and gradients on 8 devices are those of one."""
    devices, shardings = _placed(bench, MESH)
    params = jax.device_put(bench.params, shardings)
    split = [axis for x in jax.tree.leaves(params) for axis in [x.sharding.is_fully_replicated]]
    if all(split):
        raise Failed("no parameter is split")
    with jax.set_mesh(devices):
        found = bench.run(params, *mesh.to_global(devices, bench.inputs))
    plain, valid = bench.plain, bench.valid(bench.plain)
    close(found.states[valid], plain.states[valid], 2e-5, "states")
    close(_second(found), _second(plain), 2e-5, "scores or counts")
    close(found.inputs, plain.inputs, 1e-4, "the gradient of the inputs")
    top = max(float(np.abs(x).max()) for x in jax.tree.leaves(plain.parameters))
    theirs = rules.flatten(found.parameters)
    for path, x in rules.flatten(plain.parameters).items():
        far = float(np.abs(theirs[path] - x).max()) / top
        if not far <= 1e-4:
            raise Failed(f"the gradient of {path} differs by {far:.2g} of the largest")
    return ", ".join(f"{axis} {size}" for axis, size in MESH.items())


def _second(outcome: Outcome) -> np.ndarray:
    """Counts; of scores, which hang on the states alone, a part."""
    return outcome.second if outcome.second.ndim == 1 else outcome.second[0]


def restored(bench: Bench) -> str:
    """Saved on one mesh and read on another, every parameter is the same bit for bit."""
    _, shardings = _placed(bench, MESH)
    params = jax.device_put(bench.params, shardings)
    _, others = _placed(bench, OTHER_MESH)
    flat = rules.flatten(others)
    like = {
        f"{PART}/{path}": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=flat[path])
        for path, x in rules.flatten(bench.params).items()
    }
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        checkpoint.save_base(base, {PART: params}, {"stage": {}})
        found = checkpoint.load_leaves(base, PART, like)
    for path, x in rules.flatten(bench.params).items():
        if np.asarray(found[f"{PART}/{path}"]).tobytes() != x.tobytes():
            raise Failed(f"{path} is another one")
    return ""


def converted(bench: Bench) -> str:
    """To the published names and back, every parameter is the same bit for bit."""
    if bench.subject.rows is None:
        raise NotApplicable("no converter was named")
    fresh, table = bench.subject.fresh, tuple(bench.subject.rows(bench.network))
    tensors = export_tree(table, bench.params)
    back, report = import_tree(table, tensors, bench.params, fresh=fresh)
    theirs = rules.flatten(back)
    for path, x in rules.flatten(bench.params).items():
        if path in report.fresh:
            continue
        if theirs[path].shape != x.shape or theirs[path].tobytes() != x.tobytes():
            raise Failed(f"{path} comes back as another one")
    rules.check_used(fresh, report.fresh, what="fresh")
    left = f", {len(report.fresh)} parameters fresh" if report.fresh else ""
    return f"{len(tensors)} tensors{left}"


def published(bench: Bench) -> str:
    """The published computation gives the same numbers from the exported tensors."""
    if bench.subject.reference is None or bench.subject.rows is None:
        raise NotApplicable("no reference was named")
    tensors = export_tree(bench.subject.rows(bench.network), bench.params)
    wanted = np.asarray(bench.subject.reference(tensors, *bench.inputs[:-1]))
    valid = bench.valid(bench.plain)
    far = close(bench.plain.states[valid], wanted[valid], 1e-4, "the first result")
    return f"distance {far:.1g}"


def in_bfloat16(bench: Bench) -> str:
    """With parameters and activations in bfloat16 the result is near that of float32.

    The measure is what rounding the parameters alone does, which no network escapes.
    """
    states, second = bench.half
    plain, valid, bound = bench.plain, bench.valid(bench.plain), bench.subject.bound
    if plain.second.ndim == 1 and not np.array_equal(second, plain.second):
        raise Failed(f"counts {second.tolist()}, in float32 {plain.second.tolist()}")
    if not np.isfinite(states[valid]).all():
        raise Failed("not all finite")
    least = _apart(bench.coarse.states[valid], plain.states[valid])
    far = _apart(states[valid], plain.states[valid])
    told = f"{far:.2g} of the result, {far / least:.1f} times as far as rounded parameters alone"
    if not far <= bound * least:
        raise Failed(f"{told}, allowed is {bound:g} times")
    return told


def _apart(found: np.ndarray, wanted: np.ndarray) -> float:
    """Root mean square of the difference, relative to that of `wanted`."""
    found, wanted = found.astype(np.float64), wanted.astype(np.float64)
    return math.sqrt(np.square(found - wanted).mean() / np.square(wanted).mean())


CHECKS: dict[str, Check] = {
    "gradients of parameters": gradients,
    "sharding rows": sharding_rows,
    "sharded = unsharded": sharded,
    "restored on another mesh": restored,
    "conversion inverse": converted,
    "published numbers": published,
    "bfloat16": in_bfloat16,
}
