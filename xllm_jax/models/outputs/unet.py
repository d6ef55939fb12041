"""UNet of latent diffusion (arXiv 2112.10752), as Stable Diffusion 1.x and 2.x publish it.

Levels of residual blocks, each followed by a transformer that sees the text; halved pictures on the
way down, doubled ones on the way up, where each level also gets what it gave on the way down.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from xllm_jax.models import layers
from xllm_jax.models.outputs.unet_blocks import (
    CONVOLUTIONS,
    Convolution,
    GroupNorm,
    ResNet,
    Transformer,
    Upsample,
    dense,
)

Array = jax.Array
LONGEST_PERIOD = 10000.0


class Level(nn.Module):
    """What the levels on both ways have; `heads` None has no transformers."""

    features: int
    depth: int
    heads: int | None
    groups: int
    epsilon: float
    dtype: DTypeLike
    implementation: layers.Kernel | None
    remat: str

    def block(self, number: int, x: Array, time: Array, text: Array) -> Array:
        """One residual block and its transformer, if there is one."""
        resnet = layers.recomputed(ResNet, self.remat)
        norm = (self.groups, self.epsilon, self.dtype)
        x = resnet(self.features, *norm, name=f"resnet_{number}")(x, time)
        if self.heads is None:
            return x
        transformer = layers.recomputed(Transformer, self.remat)
        options = (self.heads, self.groups, self.dtype, self.implementation)
        return transformer(*options, name=f"transformer_{number}")(x, text)


class Down(Level):
    """A level on the way down."""

    last: bool = False

    @nn.compact
    def __call__(self, x: Array, time: Array, text: Array) -> tuple[Array, tuple[Array, ...]]:
        """Returns the halved picture (the last level's as it is), and what the way up is given."""
        skips = []
        for number in range(self.depth):
            x = self.block(number, x, time, text)
            skips.append(x)
        if not self.last:
            x = Convolution(self.features, stride=2, dtype=self.dtype, name="downsample")(x)
            skips.append(x)
        return x, tuple(skips)


class Middle(Level):
    """Between the two ways: a transformer between two residual blocks."""

    @nn.compact
    def __call__(self, x: Array, time: Array, text: Array) -> Array:
        """Maps `[batch, height, width, features]` to the same shape."""
        x = self.block(0, x, time, text)
        norm = (self.groups, self.epsilon, self.dtype)
        return layers.recomputed(ResNet, self.remat)(self.features, *norm, name="resnet_1")(x, time)


class Up(Level):
    """A level on the way up."""

    @nn.compact
    def __call__(
        self,
        x: Array,
        time: Array,
        text: Array,
        skips: Sequence[Array],
        size: tuple[int, int] | None,
    ) -> Array:
        """Maps a picture to `size`.

        Args:
          x: `[batch, height, width, channels]`.
          time, text: as of `UNet`.
          skips: one for each block, from the way down, the last first.
          size: (height, width) of the next level, None for the last one.
        """
        for number, skip in enumerate(skips):
            x = self.block(number, jnp.concatenate([x, skip], axis=-1), time, text)
        return x if size is None else Upsample(self.dtype, name="upsample")(x, size)


class TimeEmbedding(nn.Module):
    """Sines of a time and two products behind them."""

    width: int
    hidden: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, time: Array) -> Array:
        """`[batch]` of any number to `[batch, hidden]`."""
        x = dense(self.hidden, "first", self.dtype)(sinusoids(time, self.width))
        return dense(self.hidden, "second", self.dtype)(jax.nn.silu(x))


def sinusoids(time: Array, width: int) -> Array:
    """Cosines, then sines, of a time at `width` / 2 frequencies.

    Args:
      time: `[batch]`, a step of the noise schedule, or one between two.
      width: even.

    Returns:
      `[batch, width]` float32.
    """
    half = width // 2
    frequencies = np.exp(-np.log(LONGEST_PERIOD) * np.arange(half) / half).astype(np.float32)
    angles = time.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class UNet(nn.Module):
    """Noisy latents, time and text to what the noise schedule asks for: noise, or v.

    Attributes:
      channels: of each level, from the finest.
      transformers: which levels have transformers.
      heads: of each level's attention; the last entry is the middle's, too.
      depth: blocks of a level on the way down; it has one more on the way up.
      latent_channels, out_channels: of the latents, and of what comes out.
      text_width: of the text encoder's vectors.
      groups, epsilon: of the group norms; those before transformers have an epsilon of their own.
      attention: implementation of `layers.attention`.
      remat: row of `layers.REMAT`, for each residual block and each transformer.
    """

    channels: Sequence[int] = (320, 640, 1280, 1280)
    transformers: Sequence[bool] = (True, True, True, False)
    heads: Sequence[int] = (8, 8, 8, 8)
    depth: int = 2
    latent_channels: int = 4
    out_channels: int = 4
    text_width: int = 768
    groups: int = 32
    epsilon: float = 1e-5
    attention: layers.Kernel | None = None
    dtype: DTypeLike = jnp.float32
    remat: str = "none"

    def example(self) -> tuple[Array, Array, Array]:
        """Arguments for `init`."""
        side = 2 ** (len(self.channels) - 1)
        latents = jnp.zeros((1, side, side, self.latent_channels))
        return latents, jnp.zeros((1,)), jnp.zeros((1, 1, self.text_width))

    @nn.compact
    def __call__(self, latents: Array, time: Array, text: Array) -> Array:
        """Predicts noise, or v.

        Args:
          latents: `[batch, height, width, latent_channels]`, of any sides.
          time: `[batch]`, steps of the noise schedule; a float may lie between two.
          text: `[batch, words, text_width]`; every word is seen, padding too.

        Returns:
          `[batch, height, width, out_channels]` float32.
        """
        text = text.astype(self.dtype)
        embedding = TimeEmbedding(self.channels[0], 4 * self.channels[0], self.dtype, name="time")
        time = embedding(time)
        x = Convolution(self.channels[0], dtype=self.dtype, name="conv_in")(latents)
        skips, last = [x], len(self.channels) - 1
        for level in range(last + 1):
            down = Down(*self._options(level), last=level == last, name=f"down_{level}")
            x, more = down(x, time, text)
            skips.extend(more)
        x = Middle(*self._options(last, middle=True), name="middle")(x, time, text)
        for number, level in enumerate(range(last, -1, -1)):
            taken = [skips.pop() for _ in range(self.depth + 1)]
            height, width = skips[-1].shape[1:3] if skips else (0, 0)
            up = Up(*self._options(level, more=1), name=f"up_{number}")
            x = up(x, time, text, taken, (height, width) if skips else None)
        x = GroupNorm(self.groups, self.epsilon, self.dtype, name="norm_out")(x)
        out = Convolution(self.out_channels, dtype=self.dtype, name="conv_out")(jax.nn.silu(x))
        return out.astype(jnp.float32)

    def _options(self, level: int, more: int = 0, middle: bool = False) -> tuple:
        """The fields of a level's `Level`; with `more` blocks than on the way down."""
        return (
            self.channels[level],
            self.depth + more,
            self.heads[level] if middle or self.transformers[level] else None,
            self.groups,
            self.epsilon,
            self.dtype,
            self.attention,
            self.remat,
        )


SIZES = {
    # runwayml/stable-diffusion-v1-5 and stabilityai/stable-diffusion-2-1.
    "stable_diffusion_1_5": dict(
        channels=(320, 640, 1280, 1280), heads=(8, 8, 8, 8), text_width=768
    ),
    "stable_diffusion_2_1": dict(
        channels=(320, 640, 1280, 1280), heads=(5, 10, 20, 20), text_width=1024
    ),
    "tiny": dict(
        channels=(24, 48, 96, 64),
        transformers=(False, False, True, True),
        heads=(2, 4, 4, 4),
        depth=1,
        text_width=96,
        groups=8,
    ),
}

SHARDING = (
    *CONVOLUTIONS,
    (r"(.*/)?time/(first|second)/kernel", PartitionSpec("fsdp", "tensor")),
    (r"(.*/)?resnet_\d+/time/kernel", PartitionSpec("fsdp", "tensor")),
    (r"(.*/)?(cross_)?attention/(query|key|value)/kernel", PartitionSpec("fsdp", "tensor")),
    (r"(.*/)?(cross_)?attention/out/kernel", PartitionSpec("tensor", None, "fsdp")),
    (r"(.*/)?feed_forward/up/kernel", PartitionSpec("fsdp", None, "tensor")),
    (r"(.*/)?feed_forward/up/bias", PartitionSpec(None, "tensor")),
    (r"(.*/)?feed_forward/down/kernel", PartitionSpec("tensor", "fsdp")),
    (r"(.*/)?project_(in|out)/kernel", PartitionSpec("fsdp", None)),
    (r"(.*/)?block/.*norm/(scale|bias)", PartitionSpec()),
    (r"(.*/)?(time|first|second|out|down|project_in|project_out)/bias", PartitionSpec()),
)
