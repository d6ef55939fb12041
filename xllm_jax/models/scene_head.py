"""A head that reads off a text encoder what a picture of the words shows, place by place.

It stands in for what CLIP's image tower was to the text encoder of Stable Diffusion: something that
makes a mini text encoder learn what words look like before a UNet has to learn to draw.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from xllm_jax.models import layers
from xllm_jax.models.layers import Dense
from xllm_jax.models.outputs import unet
from xllm_jax.models.outputs.unet_blocks import TransformerBlock

Array = jax.Array


class SceneHead(nn.Module):
    """Learned queries, one for each place, look at the words as a UNet's places do.

    Attributes:
      width: of the queries.
      text_width: of the text encoder's vectors.
      heads: of attention.
      cells: places of a picture.
      classes: of what may stand in a place.
    """

    width: int = 96
    text_width: int = 96
    heads: int = 4
    cells: int = 9
    classes: int = 61
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, states: Array) -> Array:
        """Scores of what stands in each place.

        Args:
          states: `[batch, words, text_width]`, all tokens of each text, padding too.

        Returns:
          `[batch, cells, classes]` float32.
        """
        initial = nn.initializers.normal(1.0)
        queries = self.param("places", initial, (self.cells, self.width), jnp.float32)
        x = jnp.broadcast_to(queries.astype(self.dtype), (len(states), *queries.shape))
        x = TransformerBlock(self.heads, self.dtype, name="block")(x, states)
        x = layers.LayerNorm(dtype=self.dtype, name="norm")(x)
        return Dense(self.classes, dtype=self.dtype, name="scores")(x).astype(jnp.float32)

    def example(self) -> tuple[Array]:
        """Arguments for `init`."""
        return (jnp.zeros((1, 2, self.text_width)),)


SIZES = {"tiny": dict(width=96, text_width=96, heads=4, cells=9, classes=61)}

SHARDING = (
    (r"places", PartitionSpec()),
    (r"norm/(scale|bias)", PartitionSpec()),
    (r"scores/(kernel|bias)", PartitionSpec()),
    *unet.SHARDING,
)
