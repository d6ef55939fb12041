"""Gradients written by hand, where the TPU compiler makes slow programs of autodiff's.

They are the same numbers up to rounding; docs/preflight.md tells the cycles. Other devices keep
autodiff's, whose programs are not known to gain.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from xllm_jax.core import mesh

Array = jax.Array

STATISTICS = "norm_statistics"  # by which a layer's policy can keep them for the way back


def apart(x: Array) -> Array:
    """`x`, whose gradient is made before a product reads it, and after the one that gives it.

    Within a product the compiler would compute it again for every block of that product.
    """
    return _apart(x) if mesh.kind() == "tpu" else x


@jax.custom_vjp
def _apart(x: Array) -> Array:
    return x


def _apart_forward(x: Array) -> tuple[Array, None]:
    return x, None


def _apart_backward(_: None, gradient: Array) -> tuple[Array]:
    return (jax.lax.optimization_barrier(gradient),)


_apart.defvjp(_apart_forward, _apart_backward)


def normalized(x: Array, epsilon: float) -> Array:
    """`x` less its mean over the last axis, in its standard deviations; `[..., width]` float32.

    Args:
      x: `[..., width]` float32.
      epsilon: is added to the variance.
    """
    return _by_hand(x, epsilon) if mesh.kind() == "tpu" else _plain(x, epsilon)


def _plain(x: Array, epsilon: float) -> Array:
    centered = x - x.mean(-1, keepdims=True)
    variance = jnp.square(centered).mean(-1, keepdims=True)
    return centered * jax.lax.rsqrt(variance + epsilon)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _by_hand(x: Array, epsilon: float) -> Array:
    """Both sums of the gradient at once, and the statistics kept: two passes in place of five."""
    return _plain(x, epsilon)


def _normalized_forward(x: Array, epsilon: float) -> tuple[Array, tuple[Array, Array, Array]]:
    mean = x.mean(-1)
    variance = jnp.square(x - mean[..., None]).mean(-1)
    mean, inverse = (
        checkpoint_name(kept, STATISTICS) for kept in (mean, jax.lax.rsqrt(variance + epsilon))
    )
    return (x - mean[..., None]) * inverse[..., None], (x, mean, inverse)


def _normalized_backward(
    epsilon: float, kept: tuple[Array, Array, Array], gradient: Array
) -> tuple[Array]:
    x, mean, inverse = kept
    made = (x - mean[..., None]) * inverse[..., None]
    level = gradient.mean(-1, keepdims=True)
    slope = (gradient * made).mean(-1, keepdims=True)
    return (inverse[..., None] * (gradient - level - made * slope),)


_by_hand.defvjp(_normalized_forward, _normalized_backward)
