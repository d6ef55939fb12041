"""LoRA (Hu et al. 2021, arXiv 2106.09685): low-rank additions to kernels, in a tree of their own.

Beside a kernel `PATH/kernel` `[*layers, *inputs, *outputs]` stand `PATH/lora_a` `[*layers, *inputs,
r]` and `PATH/lora_b` `[*layers, r, *outputs]`; the kernel becomes kernel + scale * a b, and scale
is alpha / r.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from xllm_jax.core import rules
from xllm_jax.core.errors import UserError
from xllm_jax.core.types import Params

A, B = "lora_a", "lora_b"


def addition(kernel: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
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


def merge(params: Params, adapters: Params, scale: float) -> Params:
    """The network's parameters with the adapters in their kernels.

    Args:
      params: of the network.
      adapters: of some of its kernels.
      scale: alpha / r.

    Returns:
      parameters of the same shapes and dtypes.

    Raises:
      UserError: an adapter without its kernel, or of another shape.
    """
    flat, low = rules.flatten(params), rules.flatten(adapters)
    for path in low:
        place, _, kind = path.rpartition("/")
        kernel = flat.get(f"{place}/kernel")
        if kind not in (A, B) or kernel is None:
            raise UserError("is no adapter of this network", field=path)
        if kind == B:
            continue
        a, b = low[path], low.get(f"{place}/{B}")
        if b is None or not _fits(kernel, a, b):
            what = f"is of another base: {place}/kernel has shape {tuple(kernel.shape)}"
            raise UserError(what, field=path)
        flat[f"{place}/kernel"] = (
            kernel.astype(jnp.float32) + scale * addition(kernel, a, b)
        ).astype(kernel.dtype)
    return rules.unflatten(flat)


def _fits(kernel: jax.Array, a: jax.Array, b: jax.Array) -> bool:
    """Whether both belong to the kernel."""
    inputs, layers = a.ndim - 1, a.ndim + b.ndim - kernel.ndim - 2
    outer = kernel.shape[:layers]
    return (
        layers in (0, 1)
        and a.shape[:-1] == kernel.shape[:inputs]
        and b.shape == (*outer, a.shape[-1], *kernel.shape[inputs:])
    )
