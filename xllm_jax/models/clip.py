"""CLIP as a whole (arXiv 2103.00020): how alike an image and a caption are.

Both towers, each followed by a projection without bias into the space that they share. The learnt
temperature scales logits in CLIP's training and has no part in a cosine.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from xllm_jax.models import clip_text, clip_vision, layers

Array = jax.Array


class Clip(nn.Module):
    """Images and captions to cosines.

    Attributes:
      vision_fields, text_fields: fields of `ClipVision` and `ClipText`.
      shared: width of the space that both project into.
      dtype: of the towers' computations; cosines are float32.
    """

    vision_fields: Mapping[str, Any]
    text_fields: Mapping[str, Any]
    shared: int = 512
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        """Names the two towers and their projections."""
        self.vision = clip_vision.ClipVision(**self.vision_fields, dtype=self.dtype)
        self.text = clip_text.ClipText(**self.text_fields, dtype=self.dtype)
        project = functools.partial(layers.Dense, self.shared, use_bias=False, dtype=self.dtype)
        self.vision_projection = project()
        self.text_projection = project()

    def example(self) -> tuple[Array, Array]:
        """Arguments for `init`."""
        side, tokens = self.vision_fields["image_size"], self.text_fields["positions"]
        return jnp.zeros((1, side, side, 3)), jnp.zeros((1, tokens), jnp.int32)

    def images(self, values: Array) -> Array:
        """Image features `[batch, shared]`, of any length, from `ClipVision`'s values."""
        return self.vision_projection(self.vision(values)[0][:, 0])

    def texts(self, ids: Array) -> Array:
        """Text features `[batch, shared]`, of any length, from `ClipText`'s ids."""
        return self.text_projection(self.text(ids))

    def __call__(self, values: Array, ids: Array) -> Array:
        """Cosine of every image and its caption.

        Args:
          values: `[batch, height, width, 3]` float, normalized by CLIP's mean and deviation.
          ids: `[batch, tokens]` int32.

        Returns:
          `[batch]` float32 within -1..1.
        """
        return (unit(self.images(values)) * unit(self.texts(ids))).sum(-1)


def unit(x: Array) -> Array:
    """Vectors of length 1, float32, in the directions of `[..., width]`."""
    x = x.astype(jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


SIZES = {
    # openai/clip-vit-base-patch16.
    name: dict(
        vision_fields=clip_vision.SIZES[name], text_fields=clip_text.SIZES[name], shared=shared
    )
    for name, shared in (("clip_vit_b_16", 512), ("tiny", 64))
}

SHARDING = (
    (r"(.*/)?(vision|text)_projection/kernel", PartitionSpec("fsdp", "tensor")),
    *((pattern.replace("(.*/)?", "(.*/)?vision/", 1), s) for pattern, s in clip_vision.SHARDING),
    *((pattern.replace("(.*/)?", "(.*/)?text/", 1), s) for pattern, s in clip_text.SHARDING),
)
