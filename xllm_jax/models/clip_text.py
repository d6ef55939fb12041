"""The text tower of CLIP (arXiv 2103.00020): one vector per caption, or one per token.

The vision tower's blocks, in which a token sees none that comes later, over word and position
tables; a norm behind them, and the vector of the token that ends the text. CLIP's projection into
the space that it shares with images is in `clip.py`. Stable Diffusion draws from the vectors of all
tokens behind the norm (`states`): 1.x from those of OpenAI's CLIP ViT-L/14, 2.x from those of
OpenCLIP's ViT-H/14 without its last block.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from xllm_jax.models import layers, vit

Array = jax.Array


class ClipText(nn.Module):
    """Token ids to one vector per text, or per token.

    Attributes:
      vocabulary, positions: rows of the tables; `positions` is the longest text in tokens.
      width, depth, heads, hidden: sizes of the stack (`hidden`: feed-forward).
      end: id of the token that ends a text, whose first place counts; None takes the place of the
        largest id, as the original does (there, the end has the largest id of all).
      activation: of the feed-forwards, a row of `layers.ACTIVATIONS`.
      attention: implementation of `layers.attention`.
      remat: row of `layers.REMAT`.
      unroll: blocks per scan step.
    """

    vocabulary: int = 49408
    positions: int = 77
    width: int = 512
    depth: int = 12
    heads: int = 8
    hidden: int = 2048
    epsilon: float = 1e-5
    end: int | None = None
    activation: str = "quick_gelu"
    attention: layers.Kernel | None = None
    dtype: DTypeLike = jnp.float32
    remat: str = "none"
    unroll: int = 1

    def example(self) -> tuple[Array]:
        """Arguments for `init`."""
        return (jnp.zeros((1, self.positions), jnp.int32),)

    def __call__(self, ids: Array) -> Array:
        """Encodes texts.

        Args:
          ids: `[batch, tokens]` int32, at most `positions` of them. What stands behind the end is
            never seen.

        Returns:
          `[batch, width]` in `dtype`; of a text without an end, its first token's vector.
        """
        place = ends(ids, self.end)[:, None, None]
        return jnp.take_along_axis(self.states(ids), place, axis=1)[:, 0]

    @nn.compact
    def states(self, ids: Array, mask: Array | None = None) -> Array:
        """The vectors of all tokens behind the norm, which a diffusion model is conditioned on.

        Args:
          ids: `[batch, tokens]` int32, at most `positions` of them.
          mask: `[batch, tokens]` bool, False for tokens that no other sees. Stable Diffusion hides
            none: it was trained with padding in sight.

        Returns:
          `[batch, tokens, width]` in `dtype`.
        """
        x = Embeddings(self.vocabulary, self.positions, self.width, self.dtype, name="embeddings")(
            ids
        )
        activation = layers.ACTIVATIONS[self.activation]
        x = vit.run_blocks(
            self, x, mask=mask, train=False, key_bias=True, causal=True, activation=activation
        )
        return layers.LayerNorm(self.epsilon, self.dtype, name="norm_behind")(x)


class Embeddings(nn.Module):
    """Word and position tables."""

    vocabulary: int
    positions: int
    width: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, ids: Array) -> Array:
        """`[batch, tokens]` int32 to `[batch, tokens, width]`."""
        initial = layers.truncated_normal()
        words = self.param("words", initial, (self.vocabulary, self.width), jnp.float32)
        places = self.param("positions", initial, (self.positions, self.width), jnp.float32)
        return (words[ids] + places[: ids.shape[1]]).astype(self.dtype)


def ends(ids: Array, end: int | None) -> Array:
    """Where texts end: `[batch]` int32, of ids `[batch, tokens]` and `ClipText.end`."""
    return jnp.argmax(ids if end is None else ids == end, axis=-1).astype(jnp.int32)


SIZES = {
    # openai/clip-vit-base-patch16.
    "clip_vit_b_16": dict(
        vocabulary=49408, positions=77, width=512, depth=12, heads=8, hidden=2048
    ),
    # The text encoder of Stable Diffusion 1.x: openai/clip-vit-large-patch14.
    "clip_vit_l_14": dict(
        vocabulary=49408, positions=77, width=768, depth=12, heads=12, hidden=3072
    ),
    # That of Stable Diffusion 2.x: laion/CLIP-ViT-H-14-laion2B-s32B-b79K, 23 blocks of 24.
    "open_clip_vit_h_14": dict(
        vocabulary=49408,
        positions=77,
        width=1024,
        depth=23,
        heads=16,
        hidden=4096,
        activation="gelu",
    ),
    "tiny": dict(vocabulary=512, positions=32, width=96, depth=4, heads=4, hidden=384),
}

SHARDING = (
    (r"(.*/)?embeddings/words", PartitionSpec("tensor", "fsdp")),
    (r"(.*/)?embeddings/positions", PartitionSpec(None, "fsdp")),
    (r"(.*/)?layers/attention/key/bias", PartitionSpec(None, "tensor")),
    (r"(.*/)?norm_behind/(scale|bias)", PartitionSpec()),
    *vit.SHARDING,
)
