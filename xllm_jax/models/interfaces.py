"""X2L interfaces: features of one modality to embeddings that the LLM reads (paper, section 3.1).

The image interface and the video interface are two instances of `QFormerInterface`; a video is its
frames, each through the same interface. The speech interface is in `speech_interface.py`, others
for images in `mlp_interface.py` and `perceiver.py`.
"""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec

from xllm_jax.models import bert, layers, qformer

Array = jax.Array


class QFormerInterface(bert.Sizes):
    """Norm, Q-Former without text, linear adapter to the LLM's width.

    Attributes:
      queries: embeddings per image (the paper's Li).
      llm_width: width of the LLM's embeddings.
      encoder_width: width of the features.
      norm_epsilon: of the norm on the features (BLIP-2's `ln_vision`), computed in float32.
      The others as in `qformer.QFormer`.
    """

    queries: int = 32
    cross_attention_frequency: int = 2
    encoder_width: int = 1408
    llm_width: int = 4096
    norm_epsilon: float = 1e-5

    SECTIONS: ClassVar = (("norm", "queries", "qformer"), ("adapter",))

    def made_of(self, features: int) -> int:
        """Embeddings of so many features."""
        return self.queries

    @nn.compact
    def __call__(
        self,
        features: Array,
        lengths: Array,
        counts: Array | None = None,
        train: bool = False,
        sections: tuple[int, int] = (0, 2),
    ) -> tuple[Array, Array]:
        """Reads features into a fixed number of embeddings.

        Args:
          features: `[batch, patches, encoder width]`; before the second step, what the first gave.
          lengths: `[batch]` int32, valid features of each row; 0 = no image, whose embeddings are
            finite and mean nothing.
          counts: ignored; the number of embeddings is `queries`.
          train: switches dropout on.
          sections: which of SECTIONS, first and behind the last.

        Returns:
          embeddings `[batch, queries, llm_width]` in `dtype`, or before the adapter `[batch,
          queries, width]`; counts `[batch]` int32, `queries`, or 0 where there is no image.
        """
        x, counts = features, lengths
        if sections[0] == 0:
            x = self._read(features, lengths, train)
            counts = jnp.where(lengths > 0, self.queries, 0).astype(jnp.int32)
        if sections[1] == 2:
            x = layers.Dense(self.llm_width, dtype=self.dtype, name="adapter")(x)
        return x, counts

    def _read(self, features: Array, lengths: Array, train: bool) -> Array:
        """Final states of the queries, `[batch, queries, width]`."""
        image = layers.LayerNorm(self.norm_epsilon, self.dtype, name="norm")(features)
        tokens = self.param(
            "queries", layers.truncated_normal(), (self.queries, self.width), jnp.float32
        )
        states, _ = qformer.QFormer(
            **self.sizes(),
            cross_attention_frequency=self.cross_attention_frequency,
            name="qformer",
        )(
            jnp.broadcast_to(tokens, (features.shape[0], *tokens.shape)),
            image,
            jnp.arange(features.shape[1]) < lengths[:, None],
            train=train,
        )
        return states

    def example(self) -> tuple[Array, Array]:
        """Arguments for `init`."""
        return jnp.zeros((1, 2, self.encoder_width)), jnp.full(1, 2, jnp.int32)


SIZES = {
    "blip2": dict(queries=32, width=768, depth=12, heads=12, hidden=3072, encoder_width=1408),
    "tiny": dict(queries=24, width=96, depth=4, heads=4, hidden=192, encoder_width=96, dropout=0.0),
}

SHARDING = (
    *qformer.SHARDING,
    (r"adapter/kernel", PartitionSpec("fsdp", "tensor")),
    (r"norm/(scale|bias)|queries|adapter/bias", PartitionSpec()),
)
