"""Depthwise convolution over time, in the form that each backend does fast."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


@jax.custom_vjp
def depthwise_by_shifts(x: Array, kernel: Array) -> Array:
    """Depthwise convolution as one multiply-add per tap: what XLA's CPU backend does fast.

    Args:
      x: `[batch, frames, width]`.
      kernel: `[taps, width]`.
    """
    return shifted_sum(x, kernel, (kernel.shape[0] - 1) // 2)


def shifted_sum(x: Array, kernel: Array, before: int) -> Array:
    """Sum over taps of the frames, shifted by the tap less `before`, times the tap's weights.

    Args:
      x: `[batch, frames, width]`.
      kernel: `[taps, width]`.
      before: taps that look back.
    """
    taken = shifts(x, kernel.shape[0], before)
    return jnp.asarray(sum(shifted * kernel[tap] for tap, shifted in enumerate(taken)))


def shifts(x: Array, taps: int, before: int) -> list[Array]:
    """`x` `[batch, frames, width]` shifted by each tap less `before`, zero outside.

    Args:
      x: the frames.
      taps: how many.
      before: taps that look back.
    """
    padded = jnp.pad(x, ((0, 0), (before, taps - 1 - before), (0, 0)))
    return [padded[:, tap : tap + x.shape[1]] for tap in range(taps)]


def _shifts_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return depthwise_by_shifts(x, kernel), (x, kernel)


def _shifts_backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    # Left to itself, autodiff turns every shift into a padded copy of the whole array.
    x, kernel = saved
    taps = kernel.shape[0]
    before = (taps - 1) // 2
    to_x = shifted_sum(gradient, kernel[::-1], taps - 1 - before)
    to_kernel = [
        jnp.einsum("btc,btc->c", taken, gradient, preferred_element_type=jnp.float32)
        for taken in shifts(x, taps, before)
    ]
    return to_x, jnp.stack(to_kernel).astype(kernel.dtype)


depthwise_by_shifts.defvjp(_shifts_forward, _shifts_backward)


def depthwise_by_conv(x: Array, kernel: Array) -> Array:
    """Depthwise convolution by XLA's convolution: what GPUs and TPUs do fast."""
    taps, width = kernel.shape
    before = (taps - 1) // 2
    return jax.lax.conv_general_dilated(
        x,
        kernel[:, None, :],
        (1,),
        [(before, taps - 1 - before)],
        dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=width,
    )
