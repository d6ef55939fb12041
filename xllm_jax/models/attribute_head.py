"""Heads that read attributes off a vision encoder, for the embedded world's pre-training.

They stand in for what CLIP's text tower was to EVA: something that makes a mini ViT learn to see.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from xllm_jax.models.layers import Dense

Array = jax.Array


class AttributeHead(nn.Module):
    """Linear classifiers: one on every patch, one on the class token for every cell of the image.

    Attributes:
      encoder_width: width of the features.
      classes: classes of each attribute; class 0 is 'nothing there'.
      cells: cells that the image is divided into.
    """

    encoder_width: int = 96
    classes: Sequence[int] = (6, 7, 3)
    cells: int = 9
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, features: Array) -> tuple[Array, Array]:
        """Scores of all attributes, one behind the other.

        Args:
          features: `[batch, patches + 1, width]`, the class token first.

        Returns:
          `[batch, patches, sum(classes)]` and `[batch, cells, sum(classes)]`.
        """
        total = sum(self.classes)
        patches = Dense(total, dtype=self.dtype, name="patches")(features[:, 1:])
        cells = Dense((self.cells, total), dtype=self.dtype, name="cells")(features[:, 0])
        return patches, cells

    def example(self) -> tuple[Array]:
        """Arguments for `init`."""
        return (jnp.zeros((1, 2, self.encoder_width)),)


SIZES = {"tiny": dict(encoder_width=96, classes=(6, 7, 3), cells=9)}

SHARDING = ((r"(patches|cells)/(kernel|bias)", PartitionSpec()),)
