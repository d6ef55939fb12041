"""Adapters of a stage: which kernels have one, what trains of them, and where they come from."""

from __future__ import annotations

import difflib
import hashlib
import math
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec

from xllm_jax.assembly.packed_weights import layers_of
from xllm_jax.assembly.submodules import submodules
from xllm_jax.core import rules
from xllm_jax.core.errors import UserError
from xllm_jax.core.lora_settings import Lora
from xllm_jax.core.stage import Stage
from xllm_jax.core.types import Flat, Params, Shapes
from xllm_jax.models import lora, quantized
from xllm_jax.models.layers import Dense

KERNEL = "/kernel"
Split = str | tuple[str, ...] | None  # of one axis of an array, over the mesh; see PartitionSpec


def check(settings: Lora) -> None:
    """Looks whether the fields of a stage's adapters fit each other.

    Raises:
      UserError: names the field that does not.
    """
    if settings.targets and not settings.rank:
        what = "is 0, and lora.targets names kernels"
        raise UserError(what, field="lora.rank", hint="Say --config.lora.rank=16")
    if not settings.targets and (settings.rank or settings.init or settings.dora):
        hint = "Say --config.lora.targets='llm/layers/attention/.*'"
        raise UserError("names no kernel", field="lora.targets", hint=hint)


def extended(settings: Lora, networks: Mapping[str, nn.Module], tree: Params) -> Params:
    """A tree of shapes with those of the adapters beside their kernels.

    Args:
      settings: of the stage.
      networks: {part: network}.
      tree: {part: shapes}, of some of these parts.

    Raises:
      UserError: the pattern matches no kernel of a dense layer.
    """
    check(settings)
    if not settings.targets:
        return tree
    flat = rules.flatten(tree)
    found = _targets(settings, networks, flat)
    if not found:
        kernels = [path for path in flat if path.endswith(KERNEL)]
        near = difflib.get_close_matches(settings.targets, kernels, n=1, cutoff=0.3)
        hint = f"Nearest kernel: {near[0]!r}" if near else "Name kernels of dense layers"
        what = f"pattern {settings.targets!r} matches no kernel"
        raise UserError(what, field="lora.targets", hint=hint)
    return rules.unflatten(flat | found)


def held(settings: Lora, networks: Mapping[str, nn.Module], tree: Params) -> Params:
    """As `extended`, of parts that need have no adapter."""
    check(settings)
    flat = rules.flatten(tree)
    return rules.unflatten(flat | (_targets(settings, networks, flat) if settings.targets else {}))


def _targets(settings: Lora, networks: Mapping[str, nn.Module], flat: Flat) -> Shapes:
    """Shapes of the adapters."""

    def chosen(path: str) -> bool:
        names = (path, path.removesuffix(KERNEL))
        return path.endswith(KERNEL) and any(re.fullmatch(settings.targets, n) for n in names)

    modules: dict[str, Dense] = {}
    for part in sorted({path.partition("/")[0] for path in flat if chosen(path)}):
        inside = submodules(networks[part])
        modules |= {f"{part}/{n}": m for n, m in inside.items() if isinstance(m, Dense)}
    found: Shapes = {}
    for path, module in modules.items():
        if path + KERNEL in flat and chosen(path + KERNEL):
            found |= shapes(settings, path, module, flat[path + KERNEL].shape)
    return found


def shapes(settings: Lora, path: str, module: Dense, kernel: tuple[int, ...]) -> Shapes:
    """Shapes of the leaves of one adapter.

    Args:
      settings: of the stage.
      path: of the layer.
      module: the layer.
      kernel: shape of its kernel, `[*layers, *inputs, *outputs]`.
    """
    layers = layers_of(module, kernel)
    lead, fan_in = kernel[:layers], kernel[layers : layers + module.inputs]
    fan_out = kernel[layers + module.inputs :]
    made = {lora.A: (*lead, *fan_in, settings.rank), lora.B: (*lead, settings.rank, *fan_out)}
    made[lora.SCALE] = lead
    if settings.dora:
        made[lora.MAGNITUDE] = (*lead, *fan_out)
    if settings.dropout:
        made[lora.DROPOUT] = lead
    return {f"{path}/{n}": jax.ShapeDtypeStruct(s, jnp.float32) for n, s in made.items()}


def allowed(stage: Stage) -> tuple[str, ...]:
    """Patterns of what trains, adapters included."""
    trains = stage.lora.targets and stage.lora.trains
    return (*stage.trainable, lora.TRAINED) if trains else stage.trainable


def split(stage: Stage, tree: Params) -> tuple[Params, Params]:
    """A tree of a stage as what trains and the rest; an adapter's constants never train.

    Raises:
      UserError: a pattern that matches nothing, or packed kernels.
    """
    trains, rest = rules.split(allowed(stage), tree)
    flat = rules.flatten(trains)
    whole = [path for path in flat if quantized.is_packed(path)]
    if whole:
        hint = "Train adapters beside it: --config.lora.rank=16 --config.lora.targets=…"
        raise UserError(f"{whole[0]} is quantized and cannot train", field="trainable", hint=hint)
    constants = {path: x for path, x in flat.items() if re.fullmatch(lora.CONSTANT, path)}
    for path in constants:
        del flat[path]
    return rules.unflatten(flat), rules.join(rest, rules.unflatten(constants))


def specs(table: rules.Rules, tree: Params, what: str) -> Params:
    """PartitionSpec of every leaf of a part: a packed kernel and an adapter follow the kernel's.

    Args:
      table: SHARDING of the part's file.
      tree: of the part.
      what: the table's name, for errors.
    """
    flat = rules.flatten(tree)

    def row(path: str) -> str:
        follows = lora.is_adapter(path) or quantized.is_packed(path)
        return path.rpartition("/")[0] + KERNEL if follows else path

    plain = rules.unflatten(dict.fromkeys(map(row, flat)))
    known = rules.flatten(rules.assign(table, plain, what=what, total=False))
    found = {path: known[row(path)] for path in flat}
    for path in filter(lora.is_adapter, flat):
        place, _, name = path.rpartition("/")
        a, b, scale = (flat[f"{place}/{n}"].ndim for n in (lora.A, lora.B, lora.SCALE))
        entries = _entries(found[path], a + b - 2 - scale)
        found[path] = PartitionSpec(*_placed(name, entries, scale, flat[path].ndim))
    return rules.unflatten(found)


def _entries(spec: PartitionSpec, length: int) -> list[Split]:
    """One entry for every axis."""
    return [*spec, *(None,) * (length - len(spec))]


def _placed(name: str, kernel: list[Split], layers: int, length: int) -> list[Split]:
    """Entries of a leaf of an adapter, from those of its kernel."""
    lead = kernel[:layers]
    if name == lora.A:
        return [*kernel[: length - 1], None]
    if name == lora.B:
        return [*lead, None, *kernel[len(kernel) - (length - layers - 1) :]]
    if name == lora.MAGNITUDE:
        return [*lead, *kernel[len(kernel) - (length - layers) :]]
    return lead


def draw(settings: Lora, seed: int, like: Shapes) -> Flat:
    """New adapters, that change nothing yet; magnitudes are left to `magnitudes`.

    `lora_a` is uniform between +-1 / sqrt(inputs), as PEFT draws it, and `lora_b` is zero.

    Args:
      settings: of the stage.
      seed: of the run; with its path it gives the numbers of a leaf.
      like: {path: leaf with sharding}.
    """
    constants = {
        lora.B: 0.0,
        lora.SCALE: settings.alpha / max(settings.rank, 1),
        lora.DROPOUT: settings.dropout,
        lora.MAGNITUDE: 0.0,
    }
    layers = {path.rpartition("/")[0]: x.ndim for path, x in like.items() if "scale" in path}

    def init() -> Flat:
        made: Flat = {}
        for path, x in like.items():
            place, _, name = path.rpartition("/")
            if name != lora.A:
                made[path] = jnp.full(x.shape, constants[name], x.dtype)
                continue
            stream = int.from_bytes(hashlib.sha256(path.encode()).digest()[:4], "big")
            key = jax.random.fold_in(jax.random.key(seed), stream)
            bound = math.prod(x.shape[layers.get(place, 0) : -1]) ** -0.5
            made[path] = jax.random.uniform(key, x.shape, x.dtype, -bound, bound)
        return made

    return jax.jit(init, out_shardings={path: x.sharding for path, x in like.items()})()


def magnitudes(params: Params, drawn: set[str]) -> Params:
    """Parameters in which drawn magnitudes are the norms of what leads to each output.

    Args:
      params: all of them.
      drawn: paths of leaves that come from nowhere.
    """
    flat = rules.flatten(params)
    for path in sorted(drawn):
        place, _, name = path.rpartition("/")
        if name == lora.MAGNITUDE:
            leaves = {n: flat[f"{place}/{n}"] for n in (lora.A, lora.B, lora.SCALE)}
            layers = leaves[lora.SCALE].ndim
            kernel = _kernel(flat, place, leaves[lora.A].ndim - 1 - layers, layers)
            made = jax.jit(lora.norms, static_argnums=2)(kernel, leaves, layers)
            flat[path] = jax.device_put(made, flat[path].sharding)
    return rules.unflatten(flat)


def _kernel(flat: Flat, place: str, inputs: int, layers: int) -> jax.Array:
    """A layer's kernel, unpacked where it is packed."""
    for codes in quantized.CODES:
        values = flat.get(f"{place}{KERNEL}_{codes}")
        if values is not None:
            scale = flat[f"{place}/{quantized.SCALE}"]
            return jax.jit(quantized.unpack, static_argnums=(2, 3, 4))(
                values, scale, codes, inputs, layers
            )
    return flat[place + KERNEL]
