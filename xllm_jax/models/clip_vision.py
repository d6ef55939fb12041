"""The vision tower of CLIP (arXiv 2103.00020): for an LLM, or for the multimodal ASR decoder.

EVA's blocks with a bias on the keys as well and the quick GELU; a norm before the blocks and one
behind them, a patch projection without bias, the class token first. CLIP's projection into the
space that it shares with text is left out.
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


class ClipVision(nn.Module):
    """Images to one feature per patch, the class token first.

    Attributes:
      image_size: side in pixels that the position table is made for.
      patch: side of a patch in pixels.
      width, depth, heads, hidden: sizes of the stack (`hidden`: feed-forward).
      final_norm: return every feature behind the last norm, so that the first is CLIP's pooled
        vector; False gives the states before it, which Hugging Face calls `last_hidden_state`.
      unused_blocks: of the last blocks, whose outcome is not asked for; LLaVA reads what one block
        before the last gives (1, and no `final_norm`).
      attention: implementation of `layers.attention`.
      chunk: as of `vit.VisionTransformer`.
      remat: row of `layers.REMAT`.
      unroll: blocks per scan step.
    """

    image_size: int = 224
    patch: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int = 3072
    epsilon: float = 1e-5
    final_norm: bool = True
    unused_blocks: int = 0
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
          values: `[batch, height, width, 3]` float, normalized by CLIP's mean and deviation; sides
            are multiples of `patch`. At another size than `image_size` the position table is
            interpolated.
          lengths: ignored; every image has all its patches.
          train: ignored; the tower has no dropout.

        Returns:
          features `[batch, patches + 1, width]` in `dtype`, lengths `[batch]` int32, all equal.
        """
        embeddings = vit.Embeddings(
            self.image_size, self.patch, self.width, self.dtype, use_bias=False, name="embeddings"
        )
        x = layers.LayerNorm(self.epsilon, self.dtype, name="norm_before")(embeddings(values))
        x = vit.run_blocks(self, x, train=train, key_bias=True, activation=layers.gelu_quick)
        normed = layers.LayerNorm(self.epsilon, self.dtype, name="norm_behind")(x)
        x = normed if self.final_norm else x
        return x, jnp.full(x.shape[:1], x.shape[1], jnp.int32)


SIZES = {
    # openai/clip-vit-base-patch16, -large-patch14, -large-patch14-336, as they are published.
    "clip_vit_b_16": dict(image_size=224, patch=16, width=768, depth=12, heads=12, hidden=3072),
    "clip_vit_l_14": dict(image_size=224, patch=14, width=1024, depth=24, heads=16, hidden=4096),
    "clip_vit_l_14_336": dict(
        image_size=336, patch=14, width=1024, depth=24, heads=16, hidden=4096
    ),
    "tiny": dict(image_size=96, patch=16, width=96, depth=4, heads=4, hidden=384),
}

SHARDING = (
    (r"(.*/)?layers/attention/key/bias", PartitionSpec(None, "tensor")),
    (r"(.*/)?norm_(before|behind)/(scale|bias)", PartitionSpec()),
    *vit.SHARDING,
)

STREAMED = vit.STREAMED
