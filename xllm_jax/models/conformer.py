"""Speech encoder: filterbank frames to acoustic features, 8 x fewer (10 ms to 80 ms frames).

A strided convolution, then conformer blocks with two max-pools between them (paper, appendix A.2;
conventions of MingLunHan/CIF-HieraDist): macaron half steps, Transformer-XL relative positions,
a convolution module with BatchNorm, no norm after the last block.

BatchNorm without a mutable collection: the running statistics are the parameters `mean` and
`variance`. In training the batch's own statistics normalize, so that these two get no gradient;
their next values are an extra result, which the training step writes into the parameters.

Padding: by default an utterance's features depend on nothing behind its end, in every batch alike.
`mask_padding=False` is the recorded behavior, where padded frames leak through the convolution,
the batch statistics and the pools.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from xllm_jax.core.types import Params
from xllm_jax.models.depthwise import depthwise_by_conv, depthwise_by_shifts
from xllm_jax.models.dropout import Dropout
from xllm_jax.models.layers import Dense, LayerNorm, stack
from xllm_jax.models.relative_attention import RelativeAttention, merge_init

Array = jax.Array
XAVIER = nn.initializers.xavier_uniform()


def frame_mask(lengths: Array, frames: int) -> Array:
    """True where a frame is valid: `[batch, frames]` bool."""
    return jnp.arange(frames) < lengths[:, None]


def convolves(choice: str | None) -> bool:
    """Whether layers take the form for accelerators ('conv') or CPUs ('shifts'); None = by backend.

    These are the depthwise step and the scores by relative position.
    """
    if choice is None:
        return jax.default_backend() != "cpu"
    return {"conv": True, "shifts": False}[choice]


class ConformerFeedForward(nn.Module):
    """Dense, SiLU, dropout, dense: `[..., width]` to `[..., width]`."""

    hidden: int
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        dense = functools.partial(Dense, dtype=self.dtype, kernel_init=XAVIER)
        y = nn.silu(dense(self.hidden, tensor_axis=0, name="up")(x))
        y = Dropout(self.dropout, name="dropout")(y, train)
        return dense(x.shape[-1], name="down")(y)


class BatchNorm(nn.Module):
    """Batch normalization over batch and frames, computed in float32.

    `mean` and `variance` are parameters without gradient in training; see the file's docstring.
    """

    train: bool = False
    momentum: float = 0.1
    epsilon: float = 1e-5
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, valid: Array | None = None) -> tuple[Array, dict[str, Array]]:
        """Normalizes `x` `[batch, frames, width]`.

        Args:
          x: the values.
          valid: `[batch, frames]` bool, frames that the batch statistics count; None for all.

        Returns:
          (normalized values, next running statistics {'mean', 'variance'} `[width]`).
        """
        width = x.shape[-1:]
        zeros, ones = nn.initializers.zeros_init(), nn.initializers.ones_init()
        scale = self.param("scale", ones, width, jnp.float32)
        bias = self.param("bias", zeros, width, jnp.float32)
        mean = self.param("mean", zeros, width, jnp.float32).astype(jnp.float32)
        variance = self.param("variance", ones, width, jnp.float32).astype(jnp.float32)
        x, running = x.astype(jnp.float32), {"mean": mean, "variance": variance}
        if self.train:
            mean, variance, count = batch_statistics(x, valid)
            unbiased = variance * count / jnp.maximum(count - 1.0, 1.0)
            now = {"mean": mean, "variance": unbiased}
            running = {
                name: old + self.momentum * (jax.lax.stop_gradient(now[name]) - old)
                for name, old in running.items()
            }
        y = (x - mean) * (jax.lax.rsqrt(variance + self.epsilon) * scale) + bias
        return y.astype(self.dtype), running


def batch_statistics(x: Array, valid: Array | None) -> tuple[Array, Array, Array]:
    """Mean, biased variance `[width]` and number of the valid frames of `[batch, frames, width]`.

    Under `jit` the sums run over the global batch, whatever devices hold its rows.
    """
    if valid is None:
        valid = jnp.ones(x.shape[:2], bool)
    weight = valid[..., None].astype(jnp.float32)
    count = jnp.maximum(weight.sum(), 1.0)
    mean = (x * weight).sum((0, 1)) / count
    variance = (jnp.square(x - mean) * weight).sum((0, 1)) / count
    return mean, variance, count


class ConvolutionModule(nn.Module):
    """Norm, gated pointwise, depthwise over time, BatchNorm, SiLU, pointwise."""

    kernel: int
    train: bool = False
    mask_padding: bool = True
    depthwise: str | None = None
    momentum: float = 0.1
    epsilon: float = 1e-5
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, valid: Array) -> tuple[Array, dict[str, Array]]:
        """Returns (`[batch, frames, width]`, next BatchNorm statistics)."""
        width = x.shape[-1]
        dense = functools.partial(Dense, use_bias=False, dtype=self.dtype, kernel_init=XAVIER)
        x = LayerNorm(self.epsilon, dtype=self.dtype, name="layer_norm")(x)
        if self.mask_padding:
            x = jnp.where(valid[..., None], x, 0)
        x = nn.glu(dense(2 * width, name="pointwise_in")(x))
        kernel = self.param("depthwise", nn.initializers.lecun_uniform(), (self.kernel, width))
        convolve = depthwise_by_conv if convolves(self.depthwise) else depthwise_by_shifts
        x = convolve(x, kernel.astype(self.dtype))
        norm = BatchNorm(self.train, self.momentum, dtype=self.dtype, name="batch_norm")
        x, statistics = norm(x, valid if self.mask_padding else None)
        return dense(width, name="pointwise_out")(nn.silu(x)), statistics


class ConformerBlock(nn.Module):
    """One conformer block: half feed-forward, attention, convolution, half feed-forward, norm."""

    hidden: int
    heads: int
    kernel: int
    dropout: float = 0.0
    train: bool = False
    mask_padding: bool = True
    depthwise: str | None = None
    momentum: float = 0.1
    epsilon: float = 1e-5
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, valid: Array) -> tuple[Array, Params]:
        """Returns (`[batch, frames, width]`, next statistics by their parameter paths)."""
        x = x + 0.5 * self.feed_forward("feed_forward_in", x)
        y = self.norm("attention_norm")(x)
        rotate = convolves(self.depthwise)
        y = RelativeAttention(self.heads, rotate, self.dtype, name="attention")(y, valid)
        x = x + self.drop(y)
        y, statistics = ConvolutionModule(
            self.kernel,
            self.train,
            self.mask_padding,
            self.depthwise,
            self.momentum,
            self.epsilon,
            self.dtype,
            name="convolution",
        )(x, valid)
        x = x + self.drop(y)
        x = x + 0.5 * self.feed_forward("feed_forward_out", x)
        return self.norm("output_norm")(x), {"convolution": {"batch_norm": statistics}}

    def norm(self, name: str) -> LayerNorm:
        return LayerNorm(self.epsilon, dtype=self.dtype, name=name)

    def drop(self, y: Array) -> Array:
        return Dropout(self.dropout)(y, self.train)

    def feed_forward(self, name: str, x: Array) -> Array:
        y = self.norm(f"{name}_norm")(x)
        layer = ConformerFeedForward(self.hidden, self.dropout, dtype=self.dtype, name=name)
        return self.drop(layer(y, self.train))


class FrontEnd(nn.Module):
    """Convolution 3 x 3 with stride 2 over time and frequency, ReLU, projection to the width."""

    width: int
    channels: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, values: Array) -> Array:
        """Maps `[batch, frames, bins]` to `[batch, (frames - 1) // 2, width]`."""
        patches = strided_patches(values.astype(self.dtype))
        conv = Dense(self.channels, dtype=self.dtype, kernel_init=conv_init, name="conv")
        x = nn.relu(conv(patches))
        project = Dense(
            self.width, inputs=2, dtype=self.dtype, kernel_init=merge_init, name="project"
        )
        return project(x)


def strided_patches(values: Array, size: int = 3, stride: int = 2) -> Array:
    """All windows of `[batch, frames, bins]`: `[batch, time, frequency, size * size]`.

    Args:
      values: `[batch, frames, bins]`.
      size, stride: of the windows, along both axes.
    """
    time, frequency = ((n - size) // stride + 1 for n in values.shape[1:])

    def taps(offset: int, count: int) -> slice:
        return slice(offset, offset + stride * (count - 1) + 1, stride)

    return jnp.stack(
        [values[:, taps(i, time), taps(j, frequency)] for i in range(size) for j in range(size)],
        axis=-1,
    )


def conv_init(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
    """Uniform by fan-in, as PyTorch initializes convolutions.

    Args:
      key: random key.
      shape: of the parameter.
      dtype: of the parameter.
    """
    return nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")(key, shape, dtype)


def max_pool(x: Array, lengths: Array, mask_padding: bool) -> tuple[Array, Array]:
    """Maximum of frame pairs; an odd last frame falls away.

    Args:
      x: `[batch, frames, width]`.
      lengths: `[batch]`.
      mask_padding: True halves every length downwards, as an utterance alone would have it. False
        is recorded: a pair with one valid frame counts, so that only the longest row is cut.

    Returns:
      (`[batch, frames // 2, width]`, lengths).
    """
    batch, frames, width = x.shape
    pairs = x[:, : frames // 2 * 2].reshape(batch, frames // 2, 2, width)
    halves = lengths // 2 if mask_padding else jnp.minimum((lengths + 1) // 2, frames // 2)
    first, second = pairs[:, :, 0], pairs[:, :, 1]
    # Not `max`: its gradient looks for the maximum again, and where the compiler has rounded the
    # frames otherwise there it finds none and divides by zero.
    return jnp.where(first >= second, first, second), halves


class SpeechEncoder(nn.Module):
    """Filterbank frames to acoustic features.

    Attributes:
      width, hidden, heads, kernel, depth: sizes of the conformer blocks.
      pools: numbers of the blocks (counted from 1) that a max-pool follows.
      channels: channels of the front-end convolution.
      bins: filterbank bins that it reads.
      dropout: rate on every residual branch and inside the feed-forwards.
      mask_padding: see the file's docstring.
      depthwise: 'conv' or 'shifts', see `convolves`.
      momentum: share of the batch in the next running statistics.
    """

    width: int
    hidden: int
    heads: int
    kernel: int
    depth: int
    pools: Sequence[int]
    channels: int
    bins: int = 80
    dropout: float = 0.1
    mask_padding: bool = True
    depthwise: str | None = None
    momentum: float = 0.1
    epsilon: float = 1e-5
    dtype: DTypeLike = jnp.float32
    unroll: int = 1
    remat: str = "none"

    INPUT: ClassVar = {"speech.features": "kaldi"}

    @property
    def reduction(self) -> int:
        """Frames of the filterbank in a feature: the convolution halves them, and each pool."""
        return 2 ** (1 + len(self.pools))

    def example(self) -> tuple[Array, Array]:
        """Arguments for `init`."""
        frames = 64 * 2 ** len(self.pools)
        return jnp.zeros((1, frames, self.bins)), jnp.full(1, frames, jnp.int32)

    @nn.compact
    def __call__(
        self, values: Array, lengths: Array, train: bool = False, statistics: bool = False
    ) -> tuple[Array, Array] | tuple[Array, Array, Params]:
        """Encodes `values` `[batch, frames, bins]` float32 with `lengths` `[batch]` frames.

        Args:
          values: normalized log-mel filterbanks, zero behind each length.
          lengths: valid frames.
          train: dropout, and BatchNorm by the batch.
          statistics: also return the next running statistics, a tree with the paths that the
            statistics have in this module's parameters.

        Returns:
          (features `[batch, frames // 8, width]`, lengths `[batch]`[, statistics]).
        """
        x = FrontEnd(self.width, self.channels, self.dtype, name="front_end")(values)
        lengths = jnp.maximum(lengths - 1, 0) // 2
        project = Dense(self.width, dtype=self.dtype, kernel_init=XAVIER, name="project")
        x = project(x * jnp.asarray(self.width**0.5, self.dtype))
        x = Dropout(self.dropout)(x, train)
        updates = {}
        bounds = [0, *self.pools, self.depth]
        for number, (start, end) in enumerate(itertools.pairwise(bounds)):
            if number:
                x, lengths = max_pool(x, lengths, self.mask_padding)
            x, updates[f"blocks_{number}"] = self.blocks(number, end - start, x, lengths, train)
        if self.mask_padding:
            x = jnp.where(frame_mask(lengths, x.shape[1])[..., None], x, 0)
        return (x, lengths, updates) if statistics else (x, lengths)

    def blocks(
        self, number: int, length: int, x: Array, lengths: Array, train: bool
    ) -> tuple[Array, Params]:
        """Runs the blocks between two pools.

        Args:
          number: of the group of blocks.
          length: blocks in it.
          x: `[batch, frames, width]`.
          lengths: `[batch]` valid frames.
          train: switches dropout and the batch's own statistics on.
        """
        layers = stack(ConformerBlock, length, broadcast=1, remat=self.remat, unroll=self.unroll)(
            self.hidden,
            self.heads,
            self.kernel,
            self.dropout,
            train,
            self.mask_padding,
            self.depthwise,
            self.momentum,
            self.epsilon,
            self.dtype,
            name=f"blocks_{number}",
        )
        return layers(x, frame_mask(lengths, x.shape[1]))


SIZES = {
    "cif_asr": dict(
        width=512, hidden=2048, heads=8, kernel=31, depth=18, pools=(6, 12), channels=256
    ),
    "tiny": dict(
        width=96, hidden=384, heads=4, kernel=15, depth=6, pools=(2, 4), channels=32, dropout=0.0
    ),
}

SHARDING = (
    (r"(.*/)?front_end/project/kernel", P(None, "fsdp", "tensor")),
    (r"(.*/)?attention/(query|key|value|position)/kernel", P(None, "fsdp", "tensor", None)),
    (r"(.*/)?attention/output/kernel", P(None, "tensor", None, "fsdp")),
    (r"(.*/)?feed_forward_(in|out)/up/kernel", P(None, "fsdp", "tensor")),
    (r"(.*/)?feed_forward_(in|out)/down/kernel", P(None, "tensor", "fsdp")),
    (r"(.*/)?convolution/pointwise_(in|out)/kernel", P(None, "fsdp", "tensor")),
    (r"(.*/)?project/kernel", P("fsdp", "tensor")),
    (r".*", P()),
)
