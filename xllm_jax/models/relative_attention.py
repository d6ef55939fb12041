"""Self-attention with relative positions of Transformer-XL (arXiv 1901.02860) for conformers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from xllm_jax.models.layers import MASKED, Dense

Array = jax.Array
XAVIER = nn.initializers.xavier_uniform()


def relative_positions(frames: int, width: int) -> Array:
    """Sinusoids of the distance query - key from frames - 1 down to 1 - frames.

    Returns:
      `[2 * frames - 1, width]` float32, sine in even and cosine in odd columns.
    """
    distance = jnp.arange(frames - 1, -frames, -1, dtype=jnp.float32)
    rates = jnp.exp(jnp.arange(0, width, 2) * (-jnp.log(10000.0) / width))
    angle = distance[:, None] * rates
    return jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1).reshape(2 * frames - 1, width)


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


def blocked_shift(scores: Array, keys: int) -> Array:
    """`relative_shift` for a block of queries, by one select for every bit of the shift.

    Args:
      scores: `[..., queries, keys + queries - 1]`; queries is a power of two, and column r of row j
        is the distance of key r - (queries - 1 - j).
      keys: number of keys.

    Returns:
      `[..., queries, keys]`.
    """
    bit = scores.shape[-2]
    shifts = jnp.arange(bit)[::-1, None]
    while bit > 1:
        bit //= 2
        moved, stays = scores[..., bit:], scores[..., :-bit]
        scores = jnp.where(shifts & bit, moved, stays)
    return scores[..., :keys]


def by_blocks(query: Array, position: Array, block: int) -> Array:
    """Scores by distance, already by key, that never compute a distance which no key has.

    The TPU compiler is slow at the reshapes of `relative_shift` (docs/preflight.md), and half of
    the product in front of it is thrown away.

    Args:
      query: `[batch, frames, heads, head_dim]` with its position bias.
      position: `[2 * frames - 1, heads, head_dim]`.
      block: queries that share a slice of the table, a power of two.

    Returns:
      `[batch, heads, frames, frames]` float32.
    """
    batch, frames, heads, size = query.shape
    count = -(-frames // block)
    missing = count * block - frames
    query = jnp.pad(query, ((0, 0), (0, missing), (0, 0), (0, 0)))
    query = query.reshape(batch, count, block, heads, size)
    position = jnp.pad(position, ((missing, 0), (0, 0), (0, 0)))
    width = frames + block - 1
    starts = [(count - 1 - number) * block for number in range(count)]
    tables = jnp.stack([position[start : start + width] for start in starts])
    scores = jnp.einsum("bnqhd,nrhd->bhnqr", query, tables, preferred_element_type=jnp.float32)
    scores = blocked_shift(scores, frames)
    return scores.reshape(batch, heads, count * block, frames)[:, :, :frames]


def relative_attention(
    query: Array,
    key: Array,
    value: Array,
    position: Array,
    bias_u: Array,
    bias_v: Array,
    visible: Array | None = None,
    block: int = 0,
) -> Array:
    """Attention with Transformer-XL relative positions.

    Args:
      query, key, value: `[batch, frames, heads, head_dim]`.
      position: `[2 * frames - 1, heads, head_dim]`, projected `relative_positions`.
      bias_u, bias_v: `[heads, head_dim]` content and position biases of the query.
      visible: `[batch, frames]` bool, which keys may be seen; None for all.
      block: see `by_blocks`; 0 = all queries in one, by reshapes, which suits a CPU.

    Returns:
      `[batch, frames, heads, head_dim]` in the dtype of `value`; softmax in float32.
    """
    scale = query.shape[-1] ** -0.5
    query = query * scale
    content = jnp.einsum(
        "bqhd,bkhd->bhqk", query + bias_u * scale, key, preferred_element_type=jnp.float32
    )
    query = query + bias_v * scale
    if block:
        scores = content + by_blocks(query, position, block)
    else:
        by_distance = jnp.einsum(
            "bqhd,rhd->bhqr", query, position, preferred_element_type=jnp.float32
        )
        scores = content + relative_shift(by_distance)
    if visible is not None:
        scores = jnp.where(visible[:, None, None], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


class RelativeAttention(nn.Module):
    """Multi-head self-attention with relative positions; `block` as in `relative_attention`."""

    heads: int
    block: int = 0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, positions: Array, visible: Array | None = None) -> Array:
        """Attends over `x` `[batch, frames, width]`; `positions` `[2 * frames - 1, width]`."""
        width = x.shape[-1]
        split = (self.heads, width // self.heads)

        def dense(name: str, use_bias: bool = True) -> Dense:
            return Dense(
                split,
                use_bias=use_bias,
                dtype=self.dtype,
                kernel_init=head_init,
                tensor_axis=0,
                name=name,
            )

        position = dense("position", use_bias=False)(positions)
        bias_u = self.param("bias_u", XAVIER, split, jnp.float32).astype(self.dtype)
        bias_v = self.param("bias_v", XAVIER, split, jnp.float32).astype(self.dtype)
        query, key, value = (dense(name)(x) for name in ("query", "key", "value"))
        y = relative_attention(query, key, value, position, bias_u, bias_v, visible, self.block)
        return Dense(width, inputs=2, dtype=self.dtype, kernel_init=merge_init, name="output")(y)


def head_init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """Xavier initializer of a `[width, heads, head_dim]` kernel."""
    return nn.initializers.variance_scaling(1.0, "fan_avg", "uniform", out_axis=(-2, -1))(
        key, shape, dtype
    )


def merge_init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """Xavier initializer of a `[heads, head_dim, width]` kernel."""
    return nn.initializers.variance_scaling(1.0, "fan_avg", "uniform", in_axis=(0, 1))(
        key, shape, dtype
    )
