"""BLIP-2's first stage: a Q-Former with text and the heads of ITC, ITM and ITG.

The losses are in `objectives/blip2_pretraining.py`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from xllm_jax.models import bert, layers
from xllm_jax.models.qformer import SHARDING as QFORMER_SHARDING
from xllm_jax.models.qformer import Cache, QFormer

Array = jax.Array


class LanguageHead(nn.Module):
    """BERT's masked-language head; the decoder is the word table itself."""

    epsilon: float = 1e-12
    dtype: DTypeLike = jnp.float32
    activation: str = "gelu"

    @nn.compact
    def __call__(self, x: Array, words: Array) -> Array:
        """`[..., width]` states and the `[vocabulary, width]` table to float32 logits."""
        x = layers.Dense(x.shape[-1], dtype=self.dtype, name="dense")(x)
        x = layers.ACTIVATIONS[self.activation](x)
        x = layers.LayerNorm(self.epsilon, self.dtype, name="norm")(x)
        bias = self.param("bias", nn.initializers.zeros_init(), words.shape[:1], jnp.float32)
        logits = jnp.einsum(
            "...d,vd->...v", x, words.astype(x.dtype), preferred_element_type=jnp.float32
        )
        return logits + bias.astype(jnp.float32)


class ContrastModel(bert.Sizes):
    """BLIP-2's first stage: Q-Former with text, and heads for ITC, ITM and ITG.

    Attributes:
      queries: number of query tokens.
      embed: width in which images and texts are compared.
      norm_epsilon: of the norm behind the vision encoder.
      encoder_width: width of the image features.
      The others as in `QFormer`.
    """

    queries: int = 32
    cross_attention_frequency: int = 2
    vocabulary: int = 30523
    positions: int = 512
    embed: int = 256
    encoder_width: int = 1408
    norm_epsilon: float = 1e-5

    def setup(self):
        self.norm = layers.LayerNorm(self.norm_epsilon, self.dtype)
        self.query_tokens = self.param(
            "queries", layers.truncated_normal(), (self.queries, self.width), jnp.float32
        )
        self.qformer = QFormer(
            **self.sizes(),
            cross_attention_frequency=self.cross_attention_frequency,
            vocabulary=self.vocabulary,
            positions=self.positions,
        )
        self.image_projection = layers.Dense(self.embed, dtype=self.dtype)
        self.text_projection = layers.Dense(self.embed, dtype=self.dtype)
        self.match_head = layers.Dense(2, dtype=self.dtype)
        self.language_head = LanguageHead(self.epsilon, self.dtype, self.activation)
        self.temperature = self.param("temperature", nn.initializers.constant(0.07), ())

    def example(self) -> tuple[Array, Array, Array]:
        """Arguments for `init`."""
        ids = jnp.zeros((1, 2), jnp.int32)
        return jnp.zeros((1, 2, self.encoder_width)), ids, jnp.ones((1, 2), bool)

    def __call__(self, features: Array, ids: Array, mask: Array) -> tuple[Array, ...]:
        """Every head once, so that `init` makes every parameter; arguments as in the methods."""
        image = self.normalize(features)
        _, projected, cache = self.image(image)
        return (
            projected,
            self.text(ids, mask)[1],
            self.match(image, ids, mask)[1],
            self.caption(ids, mask, cache)[1],
            self.temperature,
        )

    def normalize(self, features: Array) -> Array:
        """The norm behind the vision encoder, `[batch, patches, encoder width]`."""
        return self.norm(features)

    def image(self, image: Array, train: bool = False) -> tuple[Array, Array, Cache]:
        """Queries over a normalized image.

        Returns:
          states `[batch, queries, width]`; their unit-length projections `[batch, queries, embed]`
          float32; the cache for `caption`.
        """
        states, cache = self.qformer(self._queries(image), image, keep_cache=True, train=train)
        return states, unit(self.image_projection(states)), cache or {}

    def text(self, ids: Array, mask: Array, train: bool = False) -> tuple[Array, Array]:
        """Text alone: states `[batch, tokens, width]`, unit-length projections of every token.

        The first token's projection stands for the text.

        Args:
          ids, mask: `[batch, tokens]` int32, and bool, True = a real token.
          train: switches dropout on.
        """
        states, _ = self.qformer(ids=ids, text_mask=mask, train=train)
        return states, unit(self.text_projection(states))

    def match(
        self,
        image: Array,
        ids: Array,
        mask: Array,
        images: Cache | None = None,
        train: bool = False,
    ) -> tuple[Array, Array]:
        """Do image and text belong together: states `[batch, queries + tokens, width]`, logits.

        Logits are `[batch, queries, 2]` float32, (no, yes) per query; their mean is the answer.
        With `images`, the cache of the `image` pass, there are three texts an image, and `image`
        holds what the second one is compared with (`qformer.shared_images`): the keys and values
        of the images themselves are not computed again.

        Args:
          image: `[batch, patches, encoder width]`, normalized.
          ids, mask: `[batch, tokens]` int32, and bool, True = a real token.
          images: the cache of the `image` pass, or None.
          train: switches dropout on.
        """
        states, _ = self.qformer(
            self._queries(ids), image, None, ids, mask, images=images, train=train
        )
        return states, self.match_head(states[:, : self.queries]).astype(jnp.float32)

    def caption(
        self, ids: Array, mask: Array, cache: Cache, train: bool = False
    ) -> tuple[Array, Array]:
        """Text behind cached queries: states, next-token logits `[batch, tokens, vocabulary]`.

        Args:
          ids, mask: `[batch, tokens]` int32, and bool, True = a real token.
          cache: of the `image` pass.
          train: switches dropout on.
        """
        states, _ = self.qformer(ids=ids, text_mask=mask, cache=cache, causal=True, train=train)
        return states, self.scores(states)

    def scores(self, states: Array) -> Array:
        """The language head: `[..., width]` to `[..., vocabulary]` float32."""
        return self.language_head(states, self._words())

    def caption_jointly(
        self, image: Array, ids: Array, mask: Array, train: bool = False
    ) -> tuple[Array, Array]:
        """`caption` without a cache, queries and text in one pass; the same logits.

        Args:
          image: `[batch, patches, encoder width]`, normalized.
          ids, mask: `[batch, tokens]` int32, and bool, True = a real token.
          train: switches dropout on.
        """
        states, _ = self.qformer(
            self._queries(image), image, None, ids, mask, causal=True, train=train
        )
        states = states[:, self.queries :]
        return states, self.scores(states)

    def _queries(self, rows: Array) -> Array:
        return jnp.broadcast_to(self.query_tokens, (rows.shape[0], *self.query_tokens.shape))

    def _words(self) -> Array:
        return self.qformer.variables["params"]["embeddings"]["words"]


def unit(x: Array) -> Array:
    """Scales the last axis to length 1, in float32."""
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


SIZES = {
    # bert-base-uncased with [DEC] added to its vocabulary.
    "blip2": dict(
        queries=32, width=768, depth=12, heads=12, hidden=3072, vocabulary=30523, encoder_width=1408
    ),
    "tiny": dict(
        queries=24,
        width=96,
        depth=4,
        heads=4,
        hidden=192,
        vocabulary=512,
        positions=128,
        embed=64,
        encoder_width=96,
        dropout=0.0,
    ),
}

SHARDING = (
    *QFORMER_SHARDING,
    (r"((image|text)_projection|language_head/dense)/kernel", PartitionSpec("fsdp", "tensor")),
    (r"((image|text)_projection|language_head/dense|match_head)/bias", PartitionSpec()),
    (r"norm/(scale|bias)|queries|temperature|match_head/kernel", PartitionSpec()),
    (r"language_head/(bias|norm/(scale|bias))", PartitionSpec()),
)
