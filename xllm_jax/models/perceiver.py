"""Flamingo's perceiver resampler as an interface (arXiv 2204.14198, section 3.1 and figure 5).

A fixed number of learned queries reads the features: in every layer they attend to the features and
to themselves together, then comes a feed-forward. A video is its frames, each through the same
interface, so that there are no embeddings of time; a linear map before the first layer lets the
resampler be of another width than the encoder; the adapter behind the last one leads to the LLM.
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


class Layer(nn.Module):
    """Cross-attention of the queries and a feed-forward, both behind norms and without biases."""

    heads: int
    hidden: int
    activation: str
    epsilon: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array, features: Array, mask: Array) -> tuple[Array, None]:
        """Maps `[batch, queries, width]`.

        Args:
          x: the queries.
          features: `[batch, patches, width]`.
          mask: `[batch, 1, 1, patches + queries]` bool, True = visible.
        """
        width = x.shape[-1]
        shape = (self.heads, width // self.heads)

        def dense(features: int | tuple[int, ...], name: str, axis: int | None = 0) -> layers.Dense:
            inputs = 2 if name == "out" else 1
            return layers.Dense(
                features, inputs, False, dtype=self.dtype, tensor_axis=axis, name=name
            )

        def norm(name: str) -> layers.LayerNorm:
            return layers.LayerNorm(self.epsilon, self.dtype, name=name)

        queries = norm("query_norm")(x)
        seen = jnp.concatenate([norm("feature_norm")(features), queries], axis=1)
        mixed = layers.attention(
            dense(shape, "query")(queries),
            dense(shape, "key")(seen),
            dense(shape, "value")(seen),
            mask,
        )
        x = x + dense(width, "out", None)(mixed)
        y = dense(self.hidden, "up")(norm("feed_forward_norm")(x))
        y = layers.ACTIVATIONS[self.activation](y)
        return x + dense(width, "down", None)(y), None


class PerceiverInterface(nn.Module):
    """Linear map, layers, norm, adapter to the LLM's width.

    Attributes:
      queries: embeddings per image.
      width, depth, heads, hidden: sizes of the layers (`hidden`: feed-forward).
      encoder_width: width of the features.
      llm_width: width of the LLM's embeddings.
      skip: features at the beginning that are left out, such as a class token.
      activation: of the feed-forwards, a row of `layers.ACTIVATIONS` (squared ReLU in Flamingo).
      epsilon: of the norms.
      remat: row of `layers.REMAT`.
      unroll: layers per scan step.
    """

    queries: int = 64
    width: int = 1536
    depth: int = 6
    heads: int = 16
    hidden: int = 6144
    encoder_width: int = 1152
    llm_width: int = 4096
    skip: int = 0
    activation: str = "relu2"
    epsilon: float = 1e-5
    dtype: DTypeLike = jnp.float32
    remat: str = "none"
    unroll: int = 1

    SECTIONS: ClassVar = (("project", "queries", "layers", "norm"), ("adapter",))

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
          features: `[batch, patches, encoder_width]`; before the second section, what the first
            gave.
          lengths: `[batch]` int32, valid features of each row; 0 = no image, whose embeddings are
            finite and mean nothing.
          counts: ignored; the number of embeddings is `queries`.
          train: ignored; there is no dropout.
          sections: which of SECTIONS, first and behind the last.

        Returns:
          embeddings `[batch, queries, llm_width]` in `dtype`, or before the adapter `[batch,
          queries, width]`; counts `[batch]` int32, `queries`, or 0 where there is no image.
        """
        x, counts = features, lengths
        if sections[0] == 0:
            x = self._read(features[:, self.skip :], lengths - self.skip)
            counts = jnp.where(lengths > 0, self.queries, 0).astype(jnp.int32)
        if sections[1] == 2:
            x = layers.Dense(self.llm_width, dtype=self.dtype, name="adapter")(x)
        return x, counts

    def _read(self, features: Array, lengths: Array) -> Array:
        """Final states of the queries, `[batch, queries, width]`."""
        batch, patches = features.shape[:2]
        features = layers.Dense(self.width, dtype=self.dtype, name="project")(features)
        shape = (self.queries, self.width)
        tokens = self.param("queries", layers.truncated_normal(), shape, jnp.float32)
        x = jnp.broadcast_to(tokens.astype(self.dtype), (batch, *shape))
        seen = jnp.arange(patches) < lengths[:, None]
        seen = jnp.pad(seen, ((0, 0), (0, self.queries)), constant_values=True)
        stack = layers.stack(Layer, self.depth, broadcast=2, remat=self.remat, unroll=self.unroll)
        fields = (self.heads, self.hidden, self.activation, self.epsilon, self.dtype)
        x, _ = stack(*fields, name="layers")(x, features, seen[:, None, None])
        return layers.LayerNorm(self.epsilon, self.dtype, name="norm")(x)

    def example(self) -> tuple[Array, Array]:
        """Arguments for `init`."""
        count = self.skip + 2
        return jnp.zeros((1, count, self.encoder_width)), jnp.full(1, count, jnp.int32)


SIZES = {
    "flamingo": dict(queries=64, width=1536, depth=6, heads=16, hidden=6144),
    "tiny": dict(queries=24, width=96, depth=2, heads=4, hidden=192, encoder_width=96),
}

SHARDING = (
    (r"project/kernel", PartitionSpec("fsdp", "tensor")),
    (r"layers/(query|key|value)/kernel", PartitionSpec(None, "fsdp", "tensor")),
    (r"layers/out/kernel", PartitionSpec(None, "tensor", None, "fsdp")),
    (r"layers/up/kernel", PartitionSpec(None, "fsdp", "tensor")),
    (r"layers/down/kernel", PartitionSpec(None, "tensor", "fsdp")),
    (r"adapter/kernel", PartitionSpec("fsdp", "tensor")),
    (
        r"layers/.*norm/(scale|bias)|(project|adapter)/bias|norm/(scale|bias)|queries",
        PartitionSpec(),
    ),
)
