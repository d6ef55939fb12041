"""LLaVA's projector as an interface: linear, GELU, linear over every feature (arXiv 2310.03744).

An image takes as many embeddings as its encoder gives features, 729 of 384 pixels in patches of 14.
Videos are their frames, each through the same interface.
"""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from xllm_jax.models import layers

Array = jax.Array


class MLPInterface(nn.Module):
    """Two linear maps with a GELU between them; the second one is called the adapter.

    Attributes:
      encoder_width: width of the features.
      hidden: width between the two; None = `llm_width`, as LLaVA has it.
      llm_width: width of the LLM's embeddings.
      skip: features at the beginning that are left out: 1 where the encoder puts a class token
        first (CLIP, EVA), 0 for SigLIP.
      activation: between the two, a row of `layers.ACTIVATIONS`.
    """

    encoder_width: int = 1152
    hidden: int | None = None
    llm_width: int = 4096
    skip: int = 0
    activation: str = "gelu"
    dtype: DTypeLike = jnp.float32

    SECTIONS: ClassVar = (("hidden",), ("adapter",))

    def made_of(self, features: int) -> int:
        """Embeddings of so many features."""
        return features - self.skip

    @nn.compact
    def __call__(
        self,
        features: Array,
        lengths: Array,
        counts: Array | None = None,
        train: bool = False,
        sections: tuple[int, int] = (0, 2),
    ) -> tuple[Array, Array]:
        """Maps every feature to one embedding.

        Args:
          features: `[batch, patches, encoder_width]`; before the second section, what the first
            gave.
          lengths: `[batch]` int32, valid features of each row; 0 = no image, whose embeddings are
            finite and mean nothing.
          counts: ignored; there are as many embeddings as features.
          train: ignored; there is no dropout.
          sections: which of SECTIONS, first and behind the last.

        Returns:
          embeddings `[batch, patches - skip, llm_width]` in `dtype`, or before the adapter
          `[batch, patches - skip, hidden]`; counts `[batch]` int32 of the valid ones.
        """
        x, valid = features, lengths
        if sections[0] == 0:
            hidden = layers.Dense(
                self.hidden or self.llm_width, dtype=self.dtype, tensor_axis=0, name="hidden"
            )
            x = layers.ACTIVATIONS[self.activation](hidden(features[:, self.skip :]))
            valid = jnp.maximum(lengths - self.skip, 0).astype(jnp.int32)
        if sections[1] == 2:
            x = layers.Dense(self.llm_width, dtype=self.dtype, name="adapter")(x)
        return x, valid

    def example(self) -> tuple[Array, Array]:
        """Arguments for `init`."""
        count = self.skip + 1
        return jnp.zeros((1, count, self.encoder_width)), jnp.full(1, count, jnp.int32)


SIZES = {
    "llava": dict(encoder_width=1024, skip=1),  # on CLIP ViT-L/14, LLaVA 1.5
    "siglip": dict(encoder_width=1152, skip=0),  # on SigLIP so400m
    "tiny": dict(encoder_width=96, hidden=128, skip=0),
}

SHARDING = (
    (r"hidden/kernel", PartitionSpec("fsdp", "tensor")),
    (r"hidden/bias", PartitionSpec("tensor")),
    (r"adapter/kernel", PartitionSpec("tensor", "fsdp")),
    (r"adapter/bias", PartitionSpec()),
)
