"""Parts of latent diffusion networks: convolution, group norm, residual block, transformer.

Pictures are `[batch, height, width, channels]` here, whatever order published files have.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from xllm_jax.core import mesh
from xllm_jax.models import layers

Array = jax.Array
Shape = tuple[int, ...]
TRANSFORMER_EPSILON = 1e-6  # of the norm before every transformer, whatever the others have


def uniform_fan_in(inputs: int) -> Callable[[Array, Shape, DTypeLike], Array]:
    """Initializer of the published networks: uniform within 1/sqrt(fan-in).

    Args:
      inputs: how many leading axes of the kernel are summed over.
    """

    def init(key: Array, shape: Shape, dtype: DTypeLike = jnp.float32) -> Array:
        bound = math.prod(shape[:inputs]) ** -0.5
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def dense(
    features: int | Shape,
    name: str,
    dtype: DTypeLike,
    *,
    inputs: int = 1,
    use_bias: bool = True,
    tensor_axis: int | None = None,
) -> layers.Dense:
    """A `layers.Dense` that starts as the published networks do; its fields."""
    return layers.Dense(
        features,
        inputs,
        use_bias,
        dtype,
        uniform_fan_in(inputs),
        tensor_axis=tensor_axis,
        name=name,
    )


class Convolution(nn.Module):
    """A square convolution.

    Attributes:
      features: channels that come out.
      size: side of the kernel.
      stride: of its places.
      padding: zeros before and behind, of height and of width.
      split: whether the mesh's 'tensor' axis splits the channels that come out.
    """

    features: int
    size: int = 3
    stride: int = 1
    padding: tuple[int, int] = (1, 1)
    dtype: DTypeLike = jnp.float32
    split: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps `[batch, height, width, channels]` to `[batch, height', width', features]`."""
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = mesh.on_device(self.param("kernel", uniform_fan_in(3), shape, jnp.float32))
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,), jnp.float32)
        y = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            (self.stride, self.stride),
            (self.padding, self.padding),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return mesh.constrain_rows(y + bias.astype(self.dtype), 3 if self.split else None)


class GroupNorm(nn.Module):
    """Normalization of groups of channels over all places, in float32, returned in `dtype`."""

    groups: int
    epsilon: float = 1e-5
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps `[batch, ..., channels]` to the same shape."""
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones_init(), (channels,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros_init(), (channels,), jnp.float32)
        rows = x.astype(jnp.float32).reshape(x.shape[0], -1, channels)
        centered = rows - self._mean(rows)
        variance = self._mean(jnp.square(centered))
        y = (centered * jax.lax.rsqrt(variance + self.epsilon)).reshape(x.shape)
        return (y * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(self.dtype)

    def _mean(self, rows: Array) -> Array:
        """The mean of each channel's group, `[batch, 1, channels]`.

        Args:
          rows: `[batch, places, channels]`. Places are summed first: a sum over them and over the
            few channels of a group at once takes a CPU three times as long.
        """
        batch, _, channels = rows.shape
        grouped = rows.mean(1).reshape(batch, self.groups, channels // self.groups).mean(-1)
        return grouped.repeat(channels // self.groups, axis=-1)[:, None]


class ResNet(nn.Module):
    """Two convolutions and their input; `time` is added between them where it is given.

    Attributes:
      features: channels that come out.
      groups, epsilon: of the norms.
    """

    features: int
    groups: int = 32
    epsilon: float = 1e-5
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, time: Array | None = None) -> Array:
        """Maps a picture to one of `features` channels.

        Args:
          x: `[batch, height, width, channels]`.
          time: `[batch, width of the time embedding]`.
        """
        norm = (self.groups, self.epsilon, self.dtype)
        y = jax.nn.silu(GroupNorm(*norm, name="norm_1")(x))
        y = Convolution(self.features, dtype=self.dtype, split=True, name="conv_1")(y)
        if time is not None:
            shift = dense(self.features, "time", self.dtype)(jax.nn.silu(time))
            y = y + shift[:, None, None]
        y = jax.nn.silu(GroupNorm(*norm, name="norm_2")(y))
        y = Convolution(self.features, dtype=self.dtype, name="conv_2")(y)
        if x.shape[-1] != self.features:
            x = dense(self.features, "shortcut", self.dtype)(x)
        return x + y


class Attention(nn.Module):
    """Attention of `x` over `context`, without biases but for the last product."""

    heads: int
    dtype: DTypeLike = jnp.float32
    implementation: layers.Kernel | None = None

    @nn.compact
    def __call__(self, x: Array, context: Array) -> Array:
        """Maps `[batch, tokens, width]`; `context` is `[batch, keys, any width]`."""
        width = x.shape[-1]
        shape = (self.heads, width // self.heads)

        def split(name: str, of: Array) -> Array:
            return dense(shape, name, self.dtype, use_bias=False, tensor_axis=0)(of)

        query, key, value = split("query", x), split("key", context), split("value", context)
        mixed = layers.attention(query, key, value, implementation=self.implementation)
        return dense(width, "out", self.dtype, inputs=2)(mixed)


class GatedFeedForward(nn.Module):
    """One half of a wide product, gated by the exact GELU of its other half."""

    hidden: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps `[batch, tokens, width]` to the same shape."""
        wide = dense((2, self.hidden), "up", self.dtype, tensor_axis=1)(x)
        gated = wide[..., 0, :] * layers.gelu_exact(wide[..., 1, :])
        return dense(x.shape[-1], "down", self.dtype)(gated)


class TransformerBlock(nn.Module):
    """Attention over the picture's own places, over the text, and a gated feed-forward."""

    heads: int
    dtype: DTypeLike = jnp.float32
    implementation: layers.Kernel | None = None

    @nn.compact
    def __call__(self, x: Array, text: Array) -> Array:
        """Maps `[batch, tokens, width]` to the same shape; `text` is `[batch, words, width']`."""

        def normed(name: str) -> Array:
            return layers.LayerNorm(dtype=self.dtype, name=name)(x)

        attention = (self.heads, self.dtype, self.implementation)
        y = normed("attention_norm")
        x = x + Attention(*attention, name="attention")(y, y)
        x = x + Attention(*attention, name="cross_attention")(normed("cross_norm"), text)
        feed_forward = GatedFeedForward(4 * x.shape[-1], self.dtype, name="feed_forward")
        return x + feed_forward(normed("feed_forward_norm"))


class Transformer(nn.Module):
    """A transformer over the places of a picture, row by row, with the picture added."""

    heads: int
    groups: int = 32
    dtype: DTypeLike = jnp.float32
    implementation: layers.Kernel | None = None

    @nn.compact
    def __call__(self, x: Array, text: Array) -> Array:
        """Maps `[batch, height, width, channels]` to the same shape.

        Args:
          x: the picture.
          text: `[batch, words, any width]`; every word is seen, padding too.
        """
        width = x.shape[-1]
        y = GroupNorm(self.groups, TRANSFORMER_EPSILON, self.dtype, name="norm")(x)
        y = dense(width, "project_in", self.dtype)(y.reshape(x.shape[0], -1, width))
        options = (self.heads, self.dtype, self.implementation)
        y = TransformerBlock(*options, name="block")(y, text)
        return x + dense(width, "project_out", self.dtype)(y).reshape(x.shape)


class Upsample(nn.Module):
    """Every place four times, then a convolution."""

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, size: tuple[int, int] | None = None) -> Array:
        """Maps `[batch, height, width, channels]` to twice the sides, or to `size`.

        Args:
          x: the picture.
          size: (height, width), at most one less than twice those of `x`.
        """
        y = x.repeat(2, axis=1).repeat(2, axis=2)
        if size is not None:
            y = y[:, : size[0], : size[1]]
        return Convolution(x.shape[-1], dtype=self.dtype, name="conv")(y)


CONVOLUTIONS = (
    (r"(.*/)?conv_1/kernel", PartitionSpec(None, None, "fsdp", "tensor")),
    (r"(.*/)?conv_1/bias", PartitionSpec("tensor")),
    (r"(.*/)?conv_2/kernel", PartitionSpec(None, None, "tensor", "fsdp")),
    (r"(.*/)?(downsample|upsample/conv|conv_in)/kernel", PartitionSpec(None, None, None, "fsdp")),
    (r"(.*/)?conv_out/kernel", PartitionSpec(None, None, "fsdp", None)),
    (r"(.*/)?shortcut/kernel", PartitionSpec("fsdp", "tensor")),
    (r"(.*/)?(conv_2|downsample|upsample/conv|conv_in|conv_out|shortcut)/bias", PartitionSpec()),
    (r"(.*/)?(norm|norm_1|norm_2|norm_out)/(scale|bias)", PartitionSpec()),
)
"""SHARDING rows of what every network of these blocks has."""
