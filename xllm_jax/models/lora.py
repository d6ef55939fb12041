"""LoRA (Hu et al. 2021, arXiv 2106.09685) and DoRA (Liu et al. 2024, arXiv 2402.09353).

Beside a kernel `PATH/kernel` `[*layers, *inputs, *outputs]` stand `PATH/lora_a` `[*layers, *inputs,
r]`, `PATH/lora_b` `[*layers, r, *outputs]` and `PATH/lora_scale` `[*layers]`, alpha / r, which does
not train; the kernel W becomes W + scale * a b. Where there is `PATH/lora_magnitude` `[*layers,
*outputs]` (DoRA), that sum is then divided by the norm of what leads to each output, through which
no gradient flows, and multiplied by the magnitude. `PATH/lora_dropout` `[*layers]` is the share of
the adapter's inputs that training drops. A network finds all of it in its parameters, so whatever
calls it needs to know nothing: scanned layers, recomputation and any sharding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from xllm_jax.core import rules
from xllm_jax.core.errors import UserError
from xllm_jax.core.types import Params
from xllm_jax.models.quantized import Quantized, product

Array = jax.Array

A, B, SCALE = "lora_a", "lora_b", "lora_scale"
MAGNITUDE, DROPOUT = "lora_magnitude", "lora_dropout"
LEAVES = (A, B, SCALE, MAGNITUDE, DROPOUT)
TRAINED = rf".*/({A}|{B}|{MAGNITUDE})"
CONSTANT = rf".*/({SCALE}|{DROPOUT})"


def is_adapter(path: str) -> bool:
    """Whether a parameter is one of an adapter, by its path."""
    return path.rpartition("/")[2] in LEAVES


def drops(params: Params) -> bool:
    """Whether any adapter in a network's parameters drops inputs."""
    return any(path.endswith(f"/{DROPOUT}") for path in rules.flatten(params))


def dropped(x: Array, rate: Array, key: Array) -> Array:
    """`x` with a share `rate` (scalar float32) of its values at zero and the others scaled."""
    words = jax.random.bits(key, x.shape, jnp.uint32)
    kept = jax.lax.optimization_barrier(words >= (rate * 2.0**32).astype(jnp.uint32))
    return jnp.where(kept, x * (1 / (1 - rate)).astype(x.dtype), 0)


def norms(kernel: Array, leaves: Mapping[str, Array], layers: int = 0) -> Array:
    """Euclidean norm of what leads to each output, `[*layers, *outputs]` float32.

    Args:
      kernel: `[*layers, *inputs, *outputs]`.
      leaves: A, B and SCALE of its adapter.
      layers: how many axes stack layers.
    """
    a, b, scale = leaves[A], leaves[B], leaves[SCALE]
    wide = scale.reshape(*scale.shape, *(1,) * (kernel.ndim - layers))
    total = kernel.astype(jnp.float32) + wide * addition(kernel, a, b)
    return jnp.sqrt(jnp.square(total).sum(tuple(range(layers, a.ndim - 1))))


def adapted(
    x: Array,
    kernel: Array | Quantized,
    y: Array,
    leaves: Mapping[str, Array],
    key: Array | None,
) -> Array:
    """What one layer's kernel and its adapter make of `x`, without the bias.

    With dropout, DoRA rescales the product of what is left, as its authors' code does.

    Args:
      x: `[..., *inputs]`.
      kernel: `[*inputs, *outputs]` in the dtype of `x`, or packed.
      y: their product.
      leaves: of the adapter, one layer's.
      key: of the dropout; None drops nothing.

    Returns:
      `[..., *outputs]` in the dtype of `x`.
    """
    a, b, inputs = leaves[A], leaves[B], leaves[A].ndim - 1
    left = x if key is None or DROPOUT not in leaves else dropped(x, leaves[DROPOUT], key)
    low = product(left, a.astype(x.dtype), inputs)
    more = product(low, (leaves[SCALE] * b).astype(x.dtype), 1)
    if MAGNITUDE not in leaves:
        return y + more
    whole = kernel.unpacked() if isinstance(kernel, Quantized) else kernel
    length = jax.lax.stop_gradient(norms(whole, leaves))
    factor = leaves[MAGNITUDE] / length
    base = y if left is x else product(left, kernel, inputs)
    return y + (factor - 1).astype(x.dtype) * base + factor.astype(x.dtype) * more


def addition(kernel: Array, a: Array, b: Array) -> Array:
    """The product `a b` in the kernel's shape, float32.

    Args:
      kernel, a, b: as the module tells.
    """
    layers = a.ndim + b.ndim - kernel.ndim - 2
    lead, rank = kernel.shape[:layers], a.shape[-1]
    inputs = math.prod(a.shape[layers:-1])
    left = a.astype(jnp.float32).reshape(*lead, inputs, rank)
    right = b.astype(jnp.float32).reshape(*lead, rank, -1)
    return (left @ right).reshape(kernel.shape)


def merged(kernel: Array, leaves: Mapping[str, Array]) -> Array:
    """The kernel with its adapter in it, in the kernel's shape and dtype.

    Args:
      kernel: `[*layers, *inputs, *outputs]`.
      leaves: of its adapter.
    """
    a, b, scale = leaves[A], leaves[B], leaves[SCALE]
    layers = a.ndim + b.ndim - kernel.ndim - 2
    wide = jnp.reshape(scale, (*jnp.shape(scale), *(1,) * (kernel.ndim - jnp.ndim(scale))))
    total = kernel.astype(jnp.float32) + wide * addition(kernel, a, b)
    if MAGNITUDE in leaves:
        factor = leaves[MAGNITUDE] / norms(kernel, leaves, layers)
        inputs = a.ndim - 1 - layers
        total *= factor.reshape(*factor.shape[:layers], *(1,) * inputs, *factor.shape[layers:])
    return total.astype(kernel.dtype)


def merge(params: Params, adapters: Params, scale: float | None = None) -> Params:
    """The network's parameters with the adapters in their kernels.

    Args:
      params: of the network.
      adapters: of some of its kernels.
      scale: alpha / r, where the adapters do not hold it.

    Returns:
      parameters of the same shapes and dtypes.

    Raises:
      UserError: an adapter without its kernel, or of another shape.
    """
    flat, low = rules.flatten(params), rules.flatten(adapters)
    for place in sorted({path.rpartition("/")[0] for path in low}):
        leaves = {name: low[f"{place}/{name}"] for name in LEAVES if f"{place}/{name}" in low}
        kernel, first = flat.get(f"{place}/kernel"), f"{place}/{next(iter(leaves), A)}"
        if kernel is None or not leaves:
            raise UserError("is no adapter of this network", field=first)
        if not _fits(kernel, leaves):
            what = f"is of another base: {place}/kernel has shape {tuple(kernel.shape)}"
            raise UserError(what, field=first)
        if scale is not None:
            leaves[SCALE] = jnp.float32(scale)
        flat[f"{place}/kernel"] = merged(kernel, leaves)
    return rules.unflatten(flat)


def _fits(kernel: Array, leaves: Mapping[str, Array]) -> bool:
    """Whether all belong to the kernel."""
    if A not in leaves or B not in leaves:
        return False
    a, b = leaves[A], leaves[B]
    inputs, layers = a.ndim - 1, a.ndim + b.ndim - kernel.ndim - 2
    outer = kernel.shape[:layers]
    return (
        layers in (0, 1)
        and a.shape[:-1] == kernel.shape[:inputs]
        and b.shape == (*outer, a.shape[-1], *kernel.shape[inputs:])
        and (MAGNITUDE not in leaves or leaves[MAGNITUDE].shape == (*outer, *b.shape[layers + 1 :]))
    )
