"""AutoencoderKL (arXiv 2112.10752): pictures to latents of a Gaussian, and latents to pictures."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from xllm_jax.models import layers
from xllm_jax.models.outputs.unet_blocks import (
    CONVOLUTIONS,
    Convolution,
    GroupNorm,
    ResNet,
    Upsample,
    dense,
)

Array = jax.Array
EPSILON = 1e-6  # of every norm here
SMALLEST, LARGEST = -30.0, 20.0  # logarithms of a variance


class PlaceAttention(nn.Module):
    """Attention between the places of a picture, with one head over all channels."""

    groups: int
    dtype: DTypeLike = jnp.float32
    implementation: layers.Kernel | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps `[batch, height, width, channels]` to the same shape."""
        width = x.shape[-1]
        y = GroupNorm(self.groups, EPSILON, self.dtype, name="norm")(x)
        y = y.reshape(x.shape[0], -1, width)
        query, key, value = (
            dense((1, width), name, self.dtype)(y) for name in ("query", "key", "value")
        )
        mixed = layers.attention(query, key, value, implementation=self.implementation)
        return x + dense(width, "out", self.dtype, inputs=2)(mixed).reshape(x.shape)


class Stack(nn.Module):
    """What encoder and decoder have in common; fields as of `Autoencoder`."""

    channels: Sequence[int]
    depth: int
    features: int
    groups: int
    dtype: DTypeLike
    implementation: layers.Kernel | None
    remat: str

    def resnet(self, features: int, name: str) -> nn.Module:
        """A residual block."""
        block = layers.recomputed(ResNet, self.remat)
        return block(features, self.groups, EPSILON, self.dtype, name=name)

    def ending(self, x: Array) -> Array:
        """The last norm and convolution."""
        x = jax.nn.silu(GroupNorm(self.groups, EPSILON, self.dtype, name="norm_out")(x))
        return Convolution(self.features, dtype=self.dtype, name="conv_out")(x)


class Middle(Stack):
    """Attention between two residual blocks."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps `[batch, height, width, channels]` to the same shape."""
        x = self.resnet(x.shape[-1], "resnet_0")(x)
        x = PlaceAttention(self.groups, self.dtype, self.implementation, name="attention")(x)
        return self.resnet(x.shape[-1], "resnet_1")(x)


class Level(Stack):
    """One level of either: residual blocks, then half or twice the sides."""

    change: str = ""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps `[batch, height, width, any]`; `change` is 'halve', 'double' or ''."""
        for number in range(self.depth):
            x = self.resnet(self.features, f"resnet_{number}")(x)
        if self.change == "halve":
            # Zeros behind only: the published encoder pads one side.
            halve = Convolution(
                self.features, stride=2, padding=(0, 1), dtype=self.dtype, name="downsample"
            )
            return halve(x)
        return Upsample(self.dtype, name="upsample")(x) if self.change else x


class Encoder(Stack):
    """Pictures to `features` numbers a place."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """`[batch, height, width, 3]` to `[batch, height / factor, width / factor, features]`."""
        x = Convolution(self.channels[0], dtype=self.dtype, name="conv_in")(x)
        rest = (self.groups, self.dtype, self.implementation, self.remat)
        last = len(self.channels) - 1
        for number, features in enumerate(self.channels):
            change = "halve" if number < last else ""
            level = Level((), self.depth, features, *rest, change, name=f"down_{number}")
            x = level(x)
        return self.ending(Middle((), 0, 0, *rest, name="middle")(x))


class Decoder(Stack):
    """Latents to pictures; its levels have one residual block more than the encoder's."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """`[batch, height, width, latent]` to `[batch, factor height, factor width, features]`."""
        x = Convolution(self.channels[-1], dtype=self.dtype, name="conv_in")(x)
        rest = (self.groups, self.dtype, self.implementation, self.remat)
        x = Middle((), 0, 0, *rest, name="middle")(x)
        last = len(self.channels) - 1
        for number, features in enumerate(reversed(self.channels)):
            change = "double" if number < last else ""
            level = Level((), self.depth + 1, features, *rest, change, name=f"up_{number}")
            x = level(x)
        return self.ending(x)


class Autoencoder(nn.Module):
    """Both ways between pictures within -1..1 and latents.

    Attributes:
      channels: of each level, from the finest.
      depth: residual blocks of an encoder's level.
      picture_channels: of pictures.
      latent_channels: of latents.
      scaling: factor between a latent and what the diffusion network works on, which has a variance
        near 1. `encode` and `decode` do not apply it.
      groups: of the group norms.
      attention: implementation of `layers.attention`.
      remat: row of `layers.REMAT`, for each residual block.
    """

    channels: Sequence[int] = (128, 256, 512, 512)
    depth: int = 2
    picture_channels: int = 3
    latent_channels: int = 4
    scaling: float = 0.18215
    groups: int = 32
    attention: layers.Kernel | None = None
    dtype: DTypeLike = jnp.float32
    remat: str = "none"

    @property
    def factor(self) -> int:
        """Sides of a picture in sides of its latents."""
        return 2 ** (len(self.channels) - 1)

    def setup(self) -> None:
        """Names encoder, decoder and the products between them."""
        rest = (self.groups, self.dtype, self.attention, self.remat)
        self.encoder = Encoder(self.channels, self.depth, 2 * self.latent_channels, *rest)
        self.decoder = Decoder(self.channels, self.depth, self.picture_channels, *rest)
        self.moments = dense(2 * self.latent_channels, "moments", self.dtype)
        self.latents = dense(self.latent_channels, "latents", self.dtype)

    def example(self) -> tuple[Array]:
        """Arguments for `init`."""
        return (jnp.zeros((1, self.factor, self.factor, self.picture_channels)),)

    def encode(self, pictures: Array) -> tuple[Array, Array]:
        """Mean and logarithm of the variance of latents.

        Args:
          pictures: `[batch, height, width, picture_channels]` within -1..1.

        Returns:
          two `[batch, height / factor, width / factor, latent_channels]` float32.

        Raises:
          ValueError: sides that are no multiples of `factor`.
        """
        if any(side % self.factor for side in pictures.shape[1:3]):
            height, width = pictures.shape[1:3]
            raise ValueError(f"picture of {height} x {width} is no multiple of {self.factor}")
        return gaussian(self.moments(self.encoder(pictures)))

    def decode(self, latents: Array) -> Array:
        """`[batch, height, width, latent_channels]` to pictures, float32, within -1..1 or near."""
        return self.decoder(self.latents(latents.astype(self.dtype))).astype(jnp.float32)

    def __call__(self, pictures: Array) -> Array:
        """Pictures by the mean of their latents."""
        return self.decode(self.encode(pictures)[0])


def gaussian(moments: Array) -> tuple[Array, Array]:
    """Mean and bounded logarithm of the variance, float32, from `[..., 2 * channels]`."""
    mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    return mean, jnp.clip(logvar, SMALLEST, LARGEST)


def deviation(logvar: Array) -> Array:
    """Standard deviation; a latent is the mean plus noise times it."""
    return jnp.exp(0.5 * logvar)


SIZES = {
    # runwayml/stable-diffusion-v1-5 and stabilityai/stable-diffusion-2-1, which are of one size.
    **{
        name: dict(channels=(128, 256, 512, 512))
        for name in ("stable_diffusion_1_5", "stable_diffusion_2_1")
    },
    "tiny": dict(channels=(16, 32, 64, 64), depth=1, groups=8),
}

SHARDING = (
    *CONVOLUTIONS,
    (r"(.*/)?attention/(query|key|value)/kernel", PartitionSpec("fsdp", None, "tensor")),
    (r"(.*/)?attention/(query|key|value)/bias", PartitionSpec(None, "tensor")),
    (r"(.*/)?attention/out/kernel", PartitionSpec(None, "tensor", "fsdp")),
    (r"(.*/)?attention/out/bias", PartitionSpec()),
    (r"(.*/)?(moments|latents)/(kernel|bias)", PartitionSpec()),
)
