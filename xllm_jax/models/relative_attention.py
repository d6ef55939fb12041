"""Self-attention with relative positions of Transformer-XL (arXiv 1901.02860) for conformers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from xllm_jax.core import mesh
from xllm_jax.models.layers import MASKED, Dense

Array = jax.Array
XAVIER = nn.initializers.xavier_uniform()


def relative_positions(frames: int, width: int) -> Array:
    """Sinusoids of the distance query - key from frames - 1 down to 1 - frames.

    Returns:
      `[2 * frames - 1, width]` float32, sine in even and cosine in odd columns.
    """
    distance = jnp.arange(frames - 1, -frames, -1, dtype=jnp.float32)
    angle = distance[:, None] * rates(width)
    return jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1).reshape(2 * frames - 1, width)


def rates(width: int) -> Array:
    """Angle per frame of every pair of columns: `[width / 2]` float32."""
    return jnp.exp(jnp.arange(0, width, 2) * (-jnp.log(10000.0) / width))


def relative_shift(scores: Array) -> Array:
    """Scores by distance to scores by key.

    Args:
      scores: `[batch, heads, queries, 2 * queries - 1]`, column r is distance queries - 1 - r.

    Returns:
      `[batch, heads, queries, queries]`: entry (q, k) is the score of distance q - k.
    """
    batch, heads, length, distances = scores.shape
    if length == 1:
        return scores
    # Row q of the answer starts at column length - 1 - q; in the flattened array that is a stride
    # of distances - 1, so one slice and one reshape do what a gather would do.
    flat = scores.reshape(batch, heads, length * distances)
    rows = flat[..., length - 1 : length - 1 + length * (distances - 1)]
    return rows.reshape(batch, heads, length, distances - 1)[..., :length]


def rotated(query: Array, kernel: Array) -> tuple[Array, Array]:
    """Queries and table whose product is the score by relative position, already by key.

    The position vector of distance q - k is made of sines and cosines, and by the addition theorem
    each is a product of one factor in q and one in k. So the query, projected back to the width of
    the position vectors and turned by its own place, meets a table of the keys' places: one matrix
    product, nothing to be moved. It has width / head_dim times the multiplications of the product
    with projected positions, and on accelerators a third of its time: there, moving every row of
    the scores by another distance costs more than all products of the block (docs/preflight.md).

    Args:
      query: `[batch, frames, heads, head_dim]`, scaled, with its position bias.
      kernel: `[width, heads, head_dim]`, the projection of `relative_positions`.

    Returns:
      (`[batch, heads, frames, width]`, table `[frames, width]`), in the dtype of `query`.
    """
    frames, dtype = query.shape[1], query.dtype
    angle = jnp.arange(frames, dtype=jnp.float32)[:, None] * rates(kernel.shape[0])
    sine, cosine = jnp.sin(angle), jnp.cos(angle)
    pairs = kernel.astype(dtype).reshape(-1, 2, *kernel.shape[1:])
    of_sine, of_cosine = (
        jnp.einsum("bqhd,whd->bhqw", query, pairs[:, n], preferred_element_type=jnp.float32)
        for n in (0, 1)
    )
    with_cosine = of_sine * sine + of_cosine * cosine
    with_sine = of_cosine * sine - of_sine * cosine
    turned = jnp.concatenate([with_cosine, with_sine], axis=-1)
    return turned.astype(dtype), jnp.concatenate([cosine, sine], axis=-1).astype(dtype)


def relative_attention(
    query: Array,
    key: Array,
    value: Array,
    kernel: Array,
    bias_u: Array,
    bias_v: Array,
    visible: Array | None = None,
    rotate: bool = False,
) -> Array:
    """Attention with Transformer-XL relative positions.

    Args:
      query, key, value: `[batch, frames, heads, head_dim]`.
      kernel: `[width, heads, head_dim]`, the projection of `relative_positions`.
      bias_u, bias_v: `[heads, head_dim]` content and position biases of the query.
      visible: `[batch, frames]` bool, which keys may be seen; None for all.
      rotate: whether scores by position come from `rotated`, which suits accelerators, or are
        moved by `relative_shift`, which suits a CPU.

    Returns:
      `[batch, frames, heads, head_dim]` in the dtype of `value`; softmax in float32.
    """
    scale = query.shape[-1] ** -0.5
    query = query * scale
    content = jnp.einsum(
        "bqhd,bkhd->bhqk", query + bias_u * scale, key, preferred_element_type=jnp.float32
    )
    query = query + bias_v * scale
    if rotate:
        turned, table = rotated(query, kernel)
        by_key = jnp.einsum("bhqw,kw->bhqk", turned, table, preferred_element_type=jnp.float32)
    else:
        by_key = relative_shift(by_distance(query, kernel))
    scores = content + by_key
    if visible is not None:
        scores = jnp.where(visible[:, None, None], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


def by_distance(query: Array, kernel: Array) -> Array:
    """Scores `[batch, heads, frames, 2 * frames - 1]` float32 with every relative position."""
    width = kernel.shape[0]
    positions = relative_positions(query.shape[1], width).astype(query.dtype)
    projected = positions @ kernel.astype(query.dtype).reshape(width, -1)
    projected = projected.reshape(-1, *kernel.shape[1:])
    return jnp.einsum("bqhd,rhd->bhqr", query, projected, preferred_element_type=jnp.float32)


class RelativeAttention(nn.Module):
    """Multi-head self-attention with relative positions; `rotate` as in `relative_attention`."""

    heads: int
    rotate: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, visible: Array | None = None) -> Array:
        """Attends over `x` `[batch, frames, width]`."""
        width = x.shape[-1]
        split = (self.heads, width // self.heads)

        def dense(name: str) -> Dense:
            return Dense(split, dtype=self.dtype, kernel_init=head_init, tensor_axis=0, name=name)

        kernel = PositionKernel(split, name="position")(width)
        bias_u = self.param("bias_u", XAVIER, split, jnp.float32).astype(self.dtype)
        bias_v = self.param("bias_v", XAVIER, split, jnp.float32).astype(self.dtype)
        query, key, value = (dense(name)(x) for name in ("query", "key", "value"))
        y = relative_attention(query, key, value, kernel, bias_u, bias_v, visible, self.rotate)
        return Dense(width, inputs=2, dtype=self.dtype, kernel_init=merge_init, name="output")(y)


class PositionKernel(nn.Module):
    """The projection of position vectors, which `relative_attention` applies in its own way."""

    split: tuple[int, int]

    @nn.compact
    def __call__(self, width: int) -> Array:
        """`[width, heads, head_dim]` float32."""
        return mesh.on_device(self.param("kernel", head_init, (width, *self.split), jnp.float32))


def head_init(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
    """Xavier initializer of a `[width, heads, head_dim]` kernel.

    Args:
      key: random key.
      shape: of the parameter.
      dtype: of the parameter.
    """
    return nn.initializers.variance_scaling(1.0, "fan_avg", "uniform", out_axis=(-2, -1))(
        key, shape, dtype
    )


def merge_init(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
    """Xavier initializer of a `[heads, head_dim, width]` kernel.

    Args:
      key: random key.
      shape: of the parameter.
      dtype: of the parameter.
    """
    return nn.initializers.variance_scaling(1.0, "fan_avg", "uniform", in_axis=(0, 1))(
        key, shape, dtype
    )
