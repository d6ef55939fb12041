"""Packed kernels of a stage's parts: their shapes, and what does not fit."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from types import ModuleType

import jax
import jax.numpy as jnp
from flax import linen as nn

from xllm_jax.assembly.submodules import submodules
from xllm_jax.core import rules
from xllm_jax.core.base_description import Told
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Part
from xllm_jax.core.types import Flat, Params, Shapes
from xllm_jax.models import quantized
from xllm_jax.models.layers import Dense

KERNEL = f"/{quantized.KERNEL}"


def layers_of(module: Dense, kernel: tuple[int, ...]) -> int:
    """How many axes of a dense layer's kernel stack layers."""
    outputs = 1 if isinstance(module.features, int) else len(module.features)
    return len(kernel) - module.inputs - outputs


def sites(network: nn.Module, file: ModuleType, flat: Flat) -> dict[str, tuple[int, int]]:
    """{path of a kernel that may be packed: (stacking axes, input axes)}: those of the layers.

    Args:
      network: of the part.
      file: where it is from, with STREAMED, the kernels of its layers.
      flat: leaves of the part, with a shape each.
    """
    patterns, found = getattr(file, "STREAMED", ()), {}
    for path, module in submodules(network).items() if patterns else ():
        name = path + KERNEL
        if isinstance(module, Dense) and any(re.fullmatch(p, name) for p in patterns):
            found[name] = (layers_of(module, flat[name].shape), module.inputs)
    return found


def packed(
    parts: Mapping[str, Part],
    networks: Mapping[str, nn.Module],
    files: Mapping[str, ModuleType],
    tree: Params,
) -> Params:
    """A tree of shapes with packed kernels where a part asks for them.

    Args:
      parts: of the stage.
      networks: {part: network}.
      files: {part: the network's file}.
      tree: {part: shapes}.

    Raises:
      UserError: a part that has no kernels to pack, or kernels with an odd number of inputs.
    """
    made = dict(tree)
    for name in sorted(made.keys() & parts.keys()):
        if not parts[name].weights:
            continue
        flat, field = rules.flatten(made[name]), f"parts.{name}.weights"
        found = sites(networks[name], files[name], flat)
        if not found:
            what = f"{parts[name].network} has no layers whose kernels can be packed"
            raise UserError(what, field=field, hint="Leave it empty")
        for path, axes in found.items():
            try:
                flat |= shapes(parts[name].weights, path, flat.pop(path).shape, *axes)
            except ValueError as error:
                hint = "Take int8"
                raise UserError(f"{path} has {error}", field=field, hint=hint) from None
        made[name] = rules.unflatten(flat)
    return made


def shapes(weights: str, path: str, kernel: tuple[int, ...], layers: int, inputs: int) -> Shapes:
    """The leaves that stand for one kernel.

    Args:
      weights: of `quantized.KINDS`.
      path: of the kernel.
      kernel: its shape.
      layers, inputs: how many axes of either.
    """
    kind, place = quantized.KINDS[weights], path.removesuffix(KERNEL)
    dtypes = {kind.leaf: kind.dtype, quantized.SCALE: jnp.float32}
    found = quantized.shapes(kind, kernel, layers, inputs)
    return {f"{place}/{n}": jax.ShapeDtypeStruct(s, dtypes[n]) for n, s in found.items()}


def axes_of(net: nn.Module, part: str, like: Flat) -> dict[str, tuple[int, int]]:
    """{path of a packed leaf: (stacking axes, input axes) of its kernel}, without those of scales.

    Args:
      net: the network of the part.
      part: its name, the first word of the paths.
      like: leaves with shapes.
    """
    names = [p for p in like if quantized.is_packed(p) and not p.endswith(quantized.SCALE)]
    inside = submodules(net) if names else {}
    found = {}
    for path in names:
        module = inside[path.rpartition("/")[0].removeprefix(f"{part}/")]
        assert isinstance(module, Dense)
        found[path] = (layers_of(module, like[path].shape), module.inputs)
    return found


def drawn(axes: Mapping[str, tuple[int, int]], like: Flat, plain: Flat) -> Flat:
    """The leaves of `like`, some of them packed, from drawn ones with kernels.

    Args:
      axes: of `axes_of`.
      like: {path: leaf that is wanted}.
      plain: {path: array}.
    """
    made = {p: plain[p].astype(x.dtype) for p, x in like.items() if not quantized.is_packed(p)}
    for path, (layers, inputs) in axes.items():
        place, _, leaf = path.rpartition("/")
        kernel, scale = plain[place + KERNEL], like[f"{place}/{quantized.SCALE}"].shape
        kind = next(
            kind
            for kind in quantized.KINDS.values()
            if kind.leaf == leaf
            and quantized.shapes(kind, kernel.shape, layers, inputs)[quantized.SCALE] == scale
        )
        leaves = quantized.pack(kernel, kind, layers, inputs, jnp)
        made |= {f"{place}/{name}": x for name, x in leaves.items()}
    return made


def kind_of(shapes: Mapping[str, Told], part: str) -> str:
    """How the kernels of a part are packed, a key of `quantized.KINDS`; '' for floats.

    Args:
      shapes: {path: (shape, dtype)} of a base, as its about.json has them.
      part: or a subtree of one.
    """
    for path, (shape, _) in shapes.items():
        place, _, leaf = path.rpartition("/")
        if not path.startswith(f"{part}/") or not quantized.is_packed(path):
            continue
        if leaf == quantized.SCALE:
            continue
        kinds = [name for name, kind in quantized.KINDS.items() if kind.leaf == leaf]
        inputs = 2 * math.prod(shape) // max(math.prod(shapes[f"{place}/{quantized.SCALE}"][0]), 1)
        whole = len(kinds) > 1 and inputs > quantized.BLOCK  # a scale is of more than a block
        return kinds[-1] if whole else kinds[0]
    return ""


def check_source(part: str, weights: str, wanted: Shapes, there: Mapping[str, Told]) -> None:
    """Compares how a part is packed with how its source is.

    Args:
      part: its name.
      weights: of the stage.
      wanted: leaves that the stage loads.
      there: {path: (shape, dtype)} of what the source holds, as the stage names it.

    Raises:
      UserError: they differ; says what to do.
    """
    packs = [p for p in wanted if quantized.is_packed(p) or p.endswith(KERNEL)]
    beside = {path.rpartition("/")[0] for path in there if path.endswith(KERNEL)}
    beside |= {path.rpartition("/")[0] for path in there if quantized.is_packed(path)}
    have = kind_of(there, part)
    for path in packs:
        other = path not in there and path.rpartition("/")[0] in beside
        # Leaves of different kinds may have the same names.
        scaled = path in there and path.endswith(quantized.SCALE) and have != weights
        if other or (scaled and tuple(there[path][0]) != wanted[path].shape):
            hint = f"Pack it: xllm quantize --weights={weights}"
            hint = f"Say --config.parts.{part}.weights={have}" if have else hint
            what = f"its source holds {have or 'floats'}"
            raise UserError(what, field=f"parts.{part}.weights", hint=hint)
