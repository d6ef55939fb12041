"""Whisper's encoder (arXiv 2212.04356): log-mel frames of 10 ms to acoustic features of 20 ms.

Two convolutions, the second with stride 2, absolute positions, EVA's blocks, a norm behind them.

Whisper was trained on 30 seconds of sound with silence behind its end, which nothing masks. With
`whole_window` every utterance is completed so before the convolutions, whatever the batch's padding
is, and the features are those that were published, up to the utterance's end. Without it the
encoder sees the utterance alone, which costs less and gives other features: right for an encoder
that trains.
"""

from __future__ import annotations

import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from xllm_jax.core.types import Params
from xllm_jax.models import layers, vit
from xllm_jax.models.cif import conv_init, windows
from xllm_jax.models.conformer import frame_mask

Array = jax.Array

RANGE, LEAST = 2.0, -1.5  # of log-mel values: 8 decades, of which the lowest possible is 1e-10


def sinusoids(key: Array, shape: tuple[int, int], dtype: DTypeLike = jnp.float32) -> Array:
    """Positions `[places, width]`: sines in the first half of the channels, cosines in the second.

    Args:
      key: ignored; an initializer has one.
      shape: of the table.
      dtype: of the table.
    """
    places, width = shape
    steps = math.log(10000) / (width // 2 - 1)
    angles = np.arange(places)[:, None] * np.exp(-steps * np.arange(width // 2))
    return jnp.asarray(np.concatenate([np.sin(angles), np.cos(angles)], axis=1), dtype)


def silence(values: Array, lengths: Array) -> Array:
    """What Whisper's features are where nothing sounds, `[batch]`.

    Args:
      values: `[batch, frames, bins]` features.
      lengths: `[batch]` frames that the sound reaches.
    """
    valid = frame_mask(lengths, values.shape[1])[..., None]
    loudest = jnp.max(jnp.where(valid, values, LEAST), axis=(1, 2))
    return jnp.maximum(loudest - RANGE, LEAST)


class WhisperEncoder(nn.Module):
    """Log-mel frames to acoustic features.

    Attributes:
      bins: mel bins of a frame.
      width, depth, heads, hidden: sizes of the stack (`hidden`: feed-forward).
      positions: places of the position table; twice as many frames are the window (30 seconds).
      activation: a row of `layers.ACTIVATIONS`.
      whole_window: see the file's docstring.
      stride: so many neighboring features become their mean; 4 gives the frames of 80 ms that the
        conformer has.
      attention: implementation of `layers.attention`.
      remat: row of `layers.REMAT`.
      unroll: blocks per scan step.
    """

    bins: int
    width: int
    depth: int
    heads: int
    hidden: int
    positions: int = 1500
    activation: str = "gelu"
    epsilon: float = 1e-5
    whole_window: bool = True
    stride: int = 1
    attention: layers.Kernel | None = None
    dtype: DTypeLike = jnp.float32
    remat: str = "none"
    unroll: int = 1

    INPUT: ClassVar = {"speech.features": "whisper"}

    @property
    def reduction(self) -> int:
        """Frames of the filterbank in one of its features."""
        return 2 * self.stride

    @property
    def most_frames(self) -> int:
        """Frames that the position table has places for."""
        return 2 * self.positions

    def example(self) -> tuple[Array, Array]:
        """Arguments for `init`."""
        return jnp.zeros((1, 16, self.bins)), jnp.full(1, 16, jnp.int32)

    @nn.compact
    def __call__(
        self, values: Array, lengths: Array, train: bool = False, statistics: bool = False
    ) -> tuple[Array, Array] | tuple[Array, Array, Params]:
        """Encodes utterances.

        Args:
          values: `[batch, frames, bins]` float32, of `data/media/log_mel.py`.
          lengths: `[batch]` frames that the sound reaches; 0 = no utterance.
          train: ignored; published encoders have no dropout.
          statistics: also return running statistics, as `conformer.SpeechEncoder` does: none.

        Returns:
          (features `[batch, frames // (2 * stride), width]` in `dtype`, rounded up and zero behind
          each length; lengths `[batch]` int32[, {}]).
        """
        frames, lengths = values.shape[1], lengths.astype(jnp.int32)
        x = self._completed(values, lengths)
        x = self._convolutions(x, None if self.whole_window else lengths)
        table = self.param("positions", sinusoids, (self.positions, self.width), jnp.float32)
        x = x + table[: x.shape[1]].astype(self.dtype)
        lengths = -(-lengths // 2)
        seen = None if self.whole_window else frame_mask(lengths, x.shape[1])
        activation = layers.ACTIVATIONS[self.activation]
        x = vit.run_blocks(self, x, mask=seen, train=train, activation=activation)
        x = layers.LayerNorm(self.epsilon, self.dtype, name="norm_behind")(x)
        x = x[:, : -(-frames // 2)]
        x = jnp.where(frame_mask(lengths, x.shape[1])[..., None], x, 0)
        x, lengths = mean_pool(x, lengths, self.stride) if self.stride > 1 else (x, lengths)
        return (x, lengths, {}) if statistics else (x, lengths)

    def _completed(self, values: Array, lengths: Array) -> Array:
        """The frames with silence, or zeros, behind each end: of the whole window, or as many."""
        frames = values.shape[1]
        if frames > self.most_frames:
            what = f"{frames} frames do not fit into a window of {self.most_frames}"
            raise ValueError(what)
        rest = 0.0
        if self.whole_window:
            rest = silence(values, lengths)[:, None, None]
            values = jnp.pad(values, ((0, 0), (0, self.most_frames - frames), (0, 0)))
        return jnp.where(frame_mask(lengths, values.shape[1])[..., None], values, rest)

    def _convolutions(self, x: Array, lengths: Array | None) -> Array:
        """`[batch, frames, bins]` to `[batch, frames / 2, width]`; zero behind given `lengths`."""
        activation = layers.ACTIVATIONS[self.activation]
        for name, stride in (("conv_1", 1), ("conv_2", 2)):
            near = windows(x.astype(self.dtype), 3)[:, ::stride]
            conv = layers.Dense(
                self.width, inputs=2, dtype=self.dtype, kernel_init=conv_init, name=name
            )
            x = activation(conv(near))
            if lengths is not None:
                x = jnp.where(frame_mask(lengths, x.shape[1])[..., None], x, 0)
                lengths = -(-lengths // 2)
        return x


def mean_pool(x: Array, lengths: Array, stride: int) -> tuple[Array, Array]:
    """Means of `stride` neighboring frames, of the valid ones at an utterance's end.

    Args:
      x: `[batch, frames, width]`, zero behind each length.
      lengths: `[batch]` valid frames.
      stride: frames that become one.

    Returns:
      (`[batch, ceil(frames / stride), width]`, lengths).
    """
    batch, frames, width = x.shape
    count = -(-frames // stride)
    x = jnp.pad(x, ((0, 0), (0, count * stride - frames), (0, 0)))
    valid = frame_mask(lengths, count * stride).reshape(batch, count, stride).sum(-1)
    total = x.reshape(batch, count, stride, width).astype(jnp.float32).sum(2)
    mean = total / jnp.maximum(valid, 1)[..., None]
    return mean.astype(x.dtype), -(-lengths // stride)


SIZES = {
    # openai/whisper-large-v3 (its encoder is large-v3-turbo's as well) and the others.
    "whisper_large_v3": dict(bins=128, width=1280, depth=32, heads=20, hidden=5120),
    "whisper_large_v2": dict(bins=80, width=1280, depth=32, heads=20, hidden=5120),
    "whisper_medium": dict(bins=80, width=1024, depth=24, heads=16, hidden=4096),
    "whisper_small": dict(bins=80, width=768, depth=12, heads=12, hidden=3072),
    "whisper_base": dict(bins=80, width=512, depth=6, heads=8, hidden=2048),
    "whisper_tiny": dict(bins=80, width=384, depth=4, heads=6, hidden=1536),
    "tiny": dict(bins=80, width=96, depth=3, heads=4, hidden=384, positions=208, stride=4),
}

SHARDING = (
    (r"(.*/)?conv_[12]/kernel", P(None, "fsdp", "tensor")),
    (r"(.*/)?layers/attention/(query|key|value)/kernel", P(None, "fsdp", "tensor")),
    (r"(.*/)?layers/attention/(query|value)/bias", P(None, "tensor")),
    (r"(.*/)?layers/attention/out/kernel", P(None, "tensor", None, "fsdp")),
    (r"(.*/)?layers/feed_forward/up/kernel", P(None, "fsdp", "tensor")),
    (r"(.*/)?layers/feed_forward/up/bias", P(None, "tensor")),
    (r"(.*/)?layers/feed_forward/down/kernel", P(None, "tensor", "fsdp")),
    (r"(.*/)?(positions|conv_[12]/bias|norm_behind/(scale|bias))", P()),
    (r"(.*/)?layers/.*(norm/(scale|bias)|(out|down)/bias)", P()),
)

STREAMED = vit.STREAMED
