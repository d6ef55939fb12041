"""ViT of EVA-CLIP g/14 as BLIP-2 cuts it: 39 of 40 blocks, no final norm (arXiv 2211.07636).

Pre-norm blocks (eps 1e-6), exact GELU, no key bias, the class token kept, absolute positions. The
norm that BLIP-2 puts behind it (`ln_vision`) belongs to the interface, since it trains with it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from xllm_jax.models import layers, row_chunks

Array = jax.Array


class Attention(nn.Module):
    """Self-attention with biases on queries and values, and on keys where `key_bias` says so."""

    heads: int
    dtype: DTypeLike = jnp.float32
    implementation: layers.Kernel | None = None
    key_bias: bool = False
    causal: bool = False

    @nn.compact
    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        """Maps `[batch, tokens, width]` to the same shape; `causal` hides what comes later.

        `mask`, `[batch, tokens]` bool, hides the tokens where it is False from all others.
        """
        width = x.shape[-1]
        shape = (self.heads, width // self.heads)
        split = functools.partial(layers.Dense, shape, dtype=self.dtype, tensor_axis=0)
        query = split(name="query")(x)
        key = split(use_bias=self.key_bias, name="key")(x)
        value = split(name="value")(x)
        tokens = x.shape[1]
        seen = None if mask is None else mask[:, None, None]
        if self.causal:
            past = jnp.tri(tokens, dtype=bool)[None, None]
            seen = past if seen is None else past & seen
        mixed = layers.attention(query, key, value, seen, implementation=self.implementation)
        return layers.Dense(width, inputs=2, dtype=self.dtype, name="out")(mixed)


class Block(nn.Module):
    """One pre-norm block; a scan block, so `train` is a field."""

    heads: int
    hidden: int
    epsilon: float
    dtype: DTypeLike
    implementation: layers.Kernel | None
    train: bool
    key_bias: bool = False
    causal: bool = False
    activation: Callable[[Array], Array] = layers.gelu_exact
    chunk: int | None = 0

    @nn.compact
    def __call__(
        self, x: Array, mask: Array | None, drop: Array | None, used: Array | None
    ) -> tuple[Array, None]:
        """Maps `[batch, tokens, width]`.

        Args:
          x: `[batch, tokens, width]`.
          mask: of `Attention`, or None.
          drop: the layer's drop-path rate, or None.
          used: whether the layer changes anything, or None where all do.
        """

        def run(block: Block, x: Array, mask: Array | None) -> Array:
            return block._whole(x, mask, drop, used)

        # What the backward pass needs of every chunk would have to be stacked: not by itself.
        chunk = 0 if self.chunk is None and self.train else self.chunk
        return row_chunks.scanned(self, run, x, mask, chunk), None

    @nn.nowrap
    def _whole(self, x: Array, mask: Array | None, drop: Array | None, used: Array | None) -> Array:
        given = x
        y = layers.LayerNorm(self.epsilon, self.dtype, name="attention_norm")(x)
        options = (self.dtype, self.implementation, self.key_bias, self.causal)
        y = Attention(self.heads, *options, name="attention")(y, mask)
        x = x + self._drop_path(y, drop)
        y = layers.LayerNorm(self.epsilon, self.dtype, name="feed_forward_norm")(x)
        feed_forward = layers.FeedForward(
            self.hidden, self.activation, dtype=self.dtype, name="feed_forward"
        )
        x = x + self._drop_path(feed_forward(y), drop)
        return x if used is None else jnp.where(used, x, given)

    def _drop_path(self, y: Array, drop: Array | None) -> Array:
        """Drops the whole branch of single examples in training and rescales the others."""
        if drop is None or not self.train:
            return y
        keep = jax.random.bernoulli(self.make_rng("dropout"), 1 - drop, (y.shape[0], 1, 1))
        return jnp.where(keep, y / (1 - drop).astype(y.dtype), 0)


class VisionTransformer(nn.Module):
    """Images to one feature per patch, the class token first.

    Attributes:
      image_size: side in pixels that the position table is made for.
      patch: side of a patch in pixels.
      width, depth, heads, hidden: sizes of the stack (`hidden`: feed-forward).
      activation: of the feed-forwards, a row of `layers.ACTIVATIONS`.
      drop_path: largest drop-path rate, reached at the last block (0 in every published config).
      attention: implementation of `layers.attention`.
      chunk: images of each device that a block takes at a time, or the largest number below that
        divides them; 0 takes all at once, None eight on a TPU outside of
        training, and all elsewhere.
      remat: row of `layers.REMAT`.
      unroll: blocks per scan step.
    """

    image_size: int = 224
    patch: int = 14
    width: int = 1408
    depth: int = 39
    heads: int = 16
    hidden: int = 6144
    activation: str = "gelu"
    epsilon: float = 1e-6
    drop_path: float = 0.0
    attention: layers.Kernel | None = None
    chunk: int | None = None
    dtype: DTypeLike = jnp.float32
    remat: str = "none"
    unroll: int = 1

    INPUT: ClassVar = {"image.normalization": "clip"}

    def features_of(self, size: int) -> int:
        """Features of a square image of so many pixels a side: patches, and the class token."""
        return (size // self.patch) ** 2 + 1

    def example(self) -> tuple[Array]:
        """Arguments for `init`."""
        return (jnp.zeros((1, self.image_size, self.image_size, 3)),)

    @nn.compact
    def __call__(
        self, values: Array, lengths: Array | None = None, train: bool = False
    ) -> tuple[Array, Array]:
        """Encodes images.

        Args:
          values: `[batch, height, width, 3]` float, normalized; sides are multiples of `patch`. At
            another size than `image_size` the position table is interpolated.
          lengths: ignored; every image has all its patches.
          train: switches drop path on.

        Returns:
          features `[batch, patches + 1, width]` in `dtype`, lengths `[batch]` int32, all equal.
        """
        x = Embeddings(self.image_size, self.patch, self.width, self.dtype, name="embeddings")(
            values
        )
        rates = jnp.linspace(0, self.drop_path, self.depth) if self.drop_path else None
        activation = layers.ACTIVATIONS[self.activation]
        x = run_blocks(self, x, rates, train=train, activation=activation)
        return x, jnp.full(x.shape[:1], x.shape[1], jnp.int32)


def run_blocks(
    tower: nn.Module,
    x: Array,
    rates: Array | None = None,
    mask: Array | None = None,
    **options: Any,
) -> Array:
    """Runs the blocks of a tower, whose parameters are named 'layers'.

    Args:
      tower: `VisionTransformer`, `ClipVision`, `SiglipVision`, `ClipText`, `WhisperEncoder`:
        sizes, epsilon, dtype and so on; where it has such fields, the last `unused_blocks` change
        nothing, and `chunk` rows of each device go through a block at a time.
      x: `[batch, tokens, width]`.
      rates: `[depth]` drop-path rates, or None.
      mask: `[batch, tokens]` bool, False for tokens that no other sees, or None.
      options: other fields of `Block`.
    """
    unused = getattr(tower, "unused_blocks", 0)
    used = jnp.arange(tower.depth) < tower.depth - unused if unused else None
    scanned = 2 if rates is not None else int(used is not None)
    stack = layers.stack(
        Block,
        tower.depth,
        broadcast=3 - scanned,
        scanned=scanned,
        remat=tower.remat,
        unroll=tower.unroll,
    )
    names = ("heads", "hidden", "epsilon", "dtype")
    fields = {name: getattr(tower, name) for name in names} | options
    fields["chunk"] = getattr(tower, "chunk", 0)
    x, _ = stack(implementation=tower.attention, **fields, name="layers")(x, mask, rates, used)
    return x


class Embeddings(nn.Module):
    """Patch projection, positions, and where `class_token` says so a class token first.

    `image_size`, for which the position table is made, need be no multiple of `patch`: the table is
    that of the whole patches.
    """

    image_size: int
    patch: int
    width: int
    dtype: DTypeLike = jnp.float32
    use_bias: bool = True
    class_token: bool = True

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """`[batch, height, width, 3]` to `[batch, patches (+ 1), width]`."""
        grid = (images.shape[1] // self.patch, images.shape[2] // self.patch)
        cells = patches(images, self.patch)
        project = layers.Dense(
            self.width, inputs=3, use_bias=self.use_bias, dtype=self.dtype, name="patches"
        )
        x = project(cells)
        first, side = int(self.class_token), self.image_size // self.patch
        shape = (first + side * side, self.width)
        table = self.param("positions", layers.truncated_normal(), shape, jnp.float32)
        positions = resize_positions(table, grid, first).astype(self.dtype)
        if not self.class_token:
            return x + positions
        token = self.param("class_token", layers.truncated_normal(), (self.width,), jnp.float32)
        token = jnp.broadcast_to(token, (x.shape[0], 1, self.width)).astype(self.dtype)
        return jnp.concatenate([token, x], axis=1) + positions


def patches(images: Array, size: int) -> Array:
    """Cuts `[batch, height, width, channels]` into `[batch, patches, size, size, channels]`.

    Patches run row by row. Sides that are not multiples of `size` are a ValueError.
    """
    batch, height, width, channels = images.shape
    if height % size or width % size:
        raise ValueError(f"image of {height} x {width} does not divide into patches of {size}")
    x = images.reshape(batch, height // size, size, width // size, size, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, size, size, channels)


def resize_positions(table: Array, grid: tuple[int, int], first: int = 1) -> Array:
    """Interpolates a position table to another grid; the class token's row stays.

    Args:
      table: `[first + side * side, width]`.
      grid: rows and columns wanted.
      first: rows before those of the patches.

    Returns:
      `[first + rows * columns, width]` float32.
    """
    table = table.astype(jnp.float32)
    side = round((table.shape[0] - first) ** 0.5)
    if grid == (side, side):
        return table
    square = table[first:].reshape(side, side, -1)
    rows, columns = bicubic_matrix(side, grid[0]), bicubic_matrix(side, grid[1])
    resized = jnp.einsum("yi,xj,ijd->yxd", rows, columns, square)
    return jnp.concatenate([table[:first], resized.reshape(-1, table.shape[1])])


def bicubic_matrix(old: int, new: int) -> np.ndarray:
    """Weights `[new, old]` of torch's bicubic resize: a = -0.75, no antialias, clamped borders.

    `jax.image.resize` uses a = -0.5 and antialiasing, which moves a table by 4-13 %.
    """
    center = (np.arange(new) + 0.5) * (old / new) - 0.5
    first = np.floor(center)
    matrix = np.zeros((new, old))
    for tap in range(-1, 3):
        distance = np.abs(center - first - tap)
        index = np.clip(first + tap, 0, old - 1).astype(int)
        np.add.at(matrix, (np.arange(new), index), _cubic(distance))
    return matrix.astype(np.float32)


def _cubic(distance: np.ndarray, a: float = -0.75) -> np.ndarray:
    """The cubic convolution kernel at distances 0 to 2."""
    d = distance
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return np.where(d <= 1, near, far)


SIZES = {
    "eva_vit_g": dict(image_size=224, patch=14, width=1408, depth=39, heads=16, hidden=6144),
    "tiny": dict(image_size=96, patch=16, width=96, depth=4, heads=4, hidden=384),
}

SHARDING = (
    (r"(.*/)?embeddings/patches/kernel", PartitionSpec(None, None, None, "fsdp")),
    (r"(.*/)?layers/attention/(query|key|value)/kernel", PartitionSpec(None, "fsdp", "tensor")),
    (r"(.*/)?layers/attention/(query|value)/bias", PartitionSpec(None, "tensor")),
    (r"(.*/)?layers/attention/out/kernel", PartitionSpec(None, "tensor", None, "fsdp")),
    (r"(.*/)?layers/feed_forward/up/kernel", PartitionSpec(None, "fsdp", "tensor")),
    (r"(.*/)?layers/feed_forward/up/bias", PartitionSpec(None, "tensor")),
    (r"(.*/)?layers/feed_forward/down/kernel", PartitionSpec(None, "tensor", "fsdp")),
    (r"(.*/)?(embeddings/(class_token|positions|patches/bias))", PartitionSpec()),
    (r"(.*/)?layers/.*(norm/(scale|bias)|(out|down)/bias)", PartitionSpec()),
)

# May stay in the host's memory: each layer fetches its own. (The TPU compiler cannot take a layer's
# row of bfloat16 biases from there; they are small.)
STREAMED = (r"layers/.*/kernel",)
