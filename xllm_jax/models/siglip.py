"""The vision tower of SigLIP and SigLIP 2 at a fixed resolution (arXiv 2303.15343, 2502.14786).

EVA's blocks with a bias on the keys as well and GELU by the tanh formula; a patch projection with
bias, absolute positions, no class token, a norm behind the blocks. The pooling head, which makes
one vector of an image, is left out: an interface reads the patches.
"""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from xllm_jax.models import layers, vit

Array = jax.Array


class SiglipVision(nn.Module):
    """Images to one feature per patch.

    Attributes:
      image_size: side in pixels that the position table is made for. What a patch does not fill at
        the right and at the bottom is cut off, as a convolution does: 384 pixels are 27 patches of
        14.
      patch: side of a patch in pixels.
      width, depth, heads, hidden: sizes of the stack (`hidden`: feed-forward).
      activation: of the feed-forwards, a row of `layers.ACTIVATIONS`.
      final_norm: norm the features, which Hugging Face calls `last_hidden_state`.
      unused_blocks: of the last blocks, whose outcome is not asked for (0, or 1 as LLaVA has it).
      attention: implementation of `layers.attention`.
      chunk: as of `vit.VisionTransformer`.
      remat: row of `layers.REMAT`.
      unroll: blocks per scan step.
    """

    image_size: int = 384
    patch: int = 14
    width: int = 1152
    depth: int = 27
    heads: int = 16
    hidden: int = 4304
    activation: str = "gelu_pytorch_tanh"
    epsilon: float = 1e-6
    final_norm: bool = True
    unused_blocks: int = 0
    attention: layers.Kernel | None = None
    chunk: int | None = None
    dtype: DTypeLike = jnp.float32
    remat: str = "none"
    unroll: int = 1

    INPUT: ClassVar = {"image.normalization": "siglip"}

    def features_of(self, size: int) -> int:
        """Features of a square image of so many pixels a side: whole patches."""
        return (size // self.patch) ** 2

    def example(self) -> tuple[Array]:
        """Arguments for `init`."""
        return (jnp.zeros((1, self.image_size, self.image_size, 3)),)

    @nn.compact
    def __call__(
        self, values: Array, lengths: Array | None = None, train: bool = False
    ) -> tuple[Array, Array]:
        """Encodes images.

        Args:
          values: `[batch, height, width, 3]` float from -1 to 1. At another number of patches than
            `image_size` has the position table is interpolated.
          lengths: ignored; every image has all its patches.
          train: ignored; the tower has no dropout.

        Returns:
          features `[batch, patches, width]` in `dtype`, lengths `[batch]` int32, all equal.
        """
        height, width = (side // self.patch * self.patch for side in values.shape[1:3])
        embeddings = vit.Embeddings(
            self.image_size,
            self.patch,
            self.width,
            self.dtype,
            class_token=False,
            name="embeddings",
        )
        x = embeddings(values[:, :height, :width])
        activation = layers.ACTIVATIONS[self.activation]
        x = vit.run_blocks(self, x, train=train, key_bias=True, activation=activation)
        normed = layers.LayerNorm(self.epsilon, self.dtype, name="norm_behind")(x)
        x = normed if self.final_norm else x
        return x, jnp.full(x.shape[:1], x.shape[1], jnp.int32)


_BASE = dict(width=768, depth=12, heads=12, hidden=3072)
_LARGE = dict(width=1024, depth=24, heads=16, hidden=4096)
_SO400M = dict(width=1152, depth=27, heads=16, hidden=4304)
_GIANT = dict(width=1536, depth=40, heads=16, hidden=6144)

SIZES = {
    # google/siglip2-so400m-patch14-384 and so on; those of SigLIP (1) are the same.
    "so400m_14_384": dict(image_size=384, patch=14, **_SO400M),
    "so400m_14_224": dict(image_size=224, patch=14, **_SO400M),
    "so400m_16_256": dict(image_size=256, patch=16, **_SO400M),
    "so400m_16_384": dict(image_size=384, patch=16, **_SO400M),
    "so400m_16_512": dict(image_size=512, patch=16, **_SO400M),
    "base_16_224": dict(image_size=224, patch=16, **_BASE),
    "base_16_384": dict(image_size=384, patch=16, **_BASE),
    "large_16_256": dict(image_size=256, patch=16, **_LARGE),
    "large_16_384": dict(image_size=384, patch=16, **_LARGE),
    "giant_16_256": dict(image_size=256, patch=16, **_GIANT),
    "giant_16_384": dict(image_size=384, patch=16, **_GIANT),
    "tiny": dict(image_size=96, patch=16, width=96, depth=4, heads=4, hidden=384),
}

SHARDING = (
    (r"(.*/)?layers/attention/key/bias", PartitionSpec(None, "tensor")),
    (r"(.*/)?norm_behind/(scale|bias)", PartitionSpec()),
    *vit.SHARDING,
)

STREAMED = vit.STREAMED
