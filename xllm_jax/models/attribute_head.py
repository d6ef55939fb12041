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

    A patch also tells its object's cell and RGB: an encoder that is asked for what it shows alone
    forgets where it is, and a Q-Former adds no positions of its own; colors that have no name make
    it tell colors and shapes apart.

    Attributes:
      encoder_width: width of the features.
      classes: classes of each attribute; class 0 is 'nothing there'.
      cells: cells that the image is divided into.
    """

    encoder_width: int = 96
    classes: Sequence[int] = (6, 7, 3)
    cells: int = 9
    dtype: DTypeLike = jnp.float32

    @property
    def patch_classes(self) -> tuple[int, ...]:
        """Classes of what a patch tells: the attributes and the cell."""
        return (*self.classes, self.cells + 1)

    @nn.compact
    def __call__(self, features: Array) -> tuple[Array, Array, Array]:
        """Scores of all attributes, one behind the other.

        Args:
          features: `[batch, patches + 1, width]`, the class token first.

        Returns:
          `[batch, patches, sum(patch_classes)]`, `[batch, cells, sum(classes)]` and colors
          `[batch, patches, 3]`.
        """
        patches = Dense(sum(self.patch_classes), dtype=self.dtype, name="patches")(features[:, 1:])
        cells = (self.cells, sum(self.classes))
        cells = Dense(cells, dtype=self.dtype, name="cells")(features[:, 0])
        colors = Dense(3, dtype=self.dtype, name="colors")(features[:, 1:])
        return patches, cells, colors

    def example(self) -> tuple[Array]:
        """Arguments for `init`."""
        return (jnp.zeros((1, 2, self.encoder_width)),)


SIZES = {"tiny": dict(encoder_width=96, classes=(6, 7, 3), cells=9)}

SHARDING = ((r"(patches|cells|colors)/(kernel|bias)", PartitionSpec()),)
