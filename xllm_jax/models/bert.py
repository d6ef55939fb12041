"""BERT: post-norm transformer layers with optional embedding tables (arXiv 1810.04805).

The C-Former of the speech interface runs it on embeddings, the multimodal ASR decoder on token
ids, and the Q-Former (`qformer.py`) is built from its attention and embeddings.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from xllm_jax.models import layers
from xllm_jax.models.dropout import Dropout

Array = jax.Array


class Attention(nn.Module):
    """Multi-head attention with biases and dropout on the probabilities.

    Attributes:
      heads: number of heads; the width of the input must divide by it.
      dropout: rate on the attention probabilities in training.
    """

    heads: int
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Array,
        memory: Array,
        mask: Array | None,
        prefix: tuple[Array, Array] | None = None,
        train: bool = False,
        seen: Callable[[Array, Array], tuple[Array, Array]] | None = None,
    ) -> tuple[Array, tuple[Array, Array]]:
        """Attends from `x` to `memory`.

        Args:
          x: `[batch, queries, width]`.
          memory: `[batch, keys, memory width]`; `x` itself for self-attention.
          mask: bool, broadcastable to `[batch, heads, queries, prefix + keys]`; True = visible.
          prefix: keys and values `[batch, prefix, heads, head_dim]` put before those of `memory`.
          train: switches dropout on.
          seen: turns keys and values of `memory` into those that each row of `x` sees, where the
            rows share memories; None = `memory` has a row for every row of `x`.

        Returns:
          output `[batch, queries, width]` and the keys and values of `memory` (without the prefix).
        """
        width = x.shape[-1]
        shape = (self.heads, width // self.heads)
        split = functools.partial(layers.Dense, shape, dtype=self.dtype, tensor_axis=0)
        query = split(name="query")(x)
        key = split(name="key")(memory)
        value = split(name="value")(memory)
        keys, values = (key, value) if seen is None else seen(key, value)
        if prefix is not None:
            keys = jnp.concatenate([prefix[0].astype(key.dtype), key], axis=1)
            values = jnp.concatenate([prefix[1].astype(value.dtype), value], axis=1)
        weights = layers.attention_weights(query, keys, mask).astype(self.dtype)
        weights = Dropout(self.dropout)(weights, train)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, values)
        return layers.Dense(width, inputs=2, dtype=self.dtype, name="out")(mixed), (key, value)


class Residual(nn.Module):
    """Dropout, residual sum, normalization: how every sub-layer of BERT ends."""

    epsilon: float
    dropout: float
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array, y: Array, train: bool = False) -> Array:
        """Returns norm(x + dropout(y)), all `[batch, tokens, width]`."""
        y = Dropout(self.dropout)(y, train)
        return layers.LayerNorm(self.epsilon, self.dtype, name="norm")(x + y)


class Embeddings(nn.Module):
    """Word, position and token-type embeddings, their norm and dropout.

    Attributes:
      width: embedding width.
      vocabulary: rows of the word table; 0 = no table, the caller gives embeddings.
      positions: rows of the position table; 0 = no table.
      types: rows of the token-type table; 0 = no table.
    """

    width: int
    vocabulary: int = 0
    positions: int = 0
    types: int = 0
    epsilon: float = 1e-12
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        ids: Array | None = None,
        embeddings: Array | None = None,
        types: Array | None = None,
        prefix: Array | None = None,
        train: bool = False,
    ) -> Array:
        """Embeds tokens, with vectors of the caller's own before them.

        Args:
          ids: `[batch, tokens]` int32, or None.
          embeddings: `[batch, tokens, width]` instead of looked-up ids, or None.
          types: `[batch, tokens]` int32; None = type 0.
          prefix: `[batch, prefix, width]` put before the tokens without position or type (the
            queries of a Q-Former), or None.
          train: switches dropout on.

        Returns:
          `[batch, prefix + tokens, width]`, positions counted from the first token.
        """
        parts = [] if prefix is None else [prefix.astype(jnp.float32)]
        if ids is not None or embeddings is not None:
            parts.append(self._tokens(ids, embeddings, types))
        x = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)
        x = layers.LayerNorm(self.epsilon, self.dtype, name="norm")(x)
        return Dropout(self.dropout)(x, train)

    def _tokens(self, ids: Array | None, embeddings: Array | None, types: Array | None) -> Array:
        words = self._table("words", self.vocabulary) if self.vocabulary else None
        if ids is not None:
            if words is None:
                raise ValueError("ids need a vocabulary, and this module has none")
            x = words[ids]
        elif embeddings is not None:
            x = embeddings.astype(jnp.float32)
        else:
            raise ValueError("give ids or embeddings")
        if self.positions:
            if x.shape[1] > self.positions:
                raise ValueError(f"{x.shape[1]} tokens, but only {self.positions} positions")
            x = x + self._table("positions", self.positions)[: x.shape[1]]
        if self.types:
            table = self._table("types", self.types)
            x = x + (table[0] if types is None else table[types])
        return x

    def _table(self, name: str, rows: int) -> Array:
        table = self.param(name, layers.truncated_normal(), (rows, self.width), jnp.float32)
        return jnp.asarray(table, jnp.float32)


class Layer(nn.Module):
    """One BERT layer; a scan block, so `train` is a field."""

    heads: int
    hidden: int
    activation: str
    epsilon: float
    dropout: float
    dtype: DTypeLike
    train: bool

    @nn.compact
    def __call__(self, x: Array, mask: Array | None) -> tuple[Array, None]:
        """Maps `[batch, tokens, width]`; `mask` as in `Attention`."""
        attention = Attention(self.heads, self.dropout, self.dtype, name="attention")
        y, _ = attention(x, x, mask, train=self.train)
        x = self._residual("attention_end")(x, y, self.train)
        activation = layers.ACTIVATIONS[self.activation]
        feed_forward = layers.FeedForward(
            self.hidden, activation, dtype=self.dtype, name="feed_forward"
        )
        return self._residual("feed_forward_end")(x, feed_forward(x), self.train), None

    def _residual(self, name: str) -> Residual:
        return Residual(self.epsilon, self.dropout, self.dtype, name=name)


class Sizes(nn.Module):
    """Fields of BERT, the Q-Former, and the networks that hold one of them.

    Attributes:
      width, depth, heads, hidden: sizes of the stack (`hidden`: feed-forward).
      activation: of the feed-forwards, a row of `layers.ACTIVATIONS`.
      epsilon: of every norm in the stack.
      dropout: rate of all dropouts in training (embeddings, attention probabilities, sub-layers).
      remat: row of `layers.REMAT`.
      unroll: layers, of the Q-Former groups of layers, per scan step.
    """

    width: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int = 3072
    activation: str = "gelu"
    epsilon: float = 1e-12
    dropout: float = 0.1
    dtype: DTypeLike = jnp.float32
    remat: str = "none"
    unroll: int = 1

    def sizes(self) -> dict[str, Any]:
        """These fields, for the stack inside."""
        names = ("width", "depth", "heads", "hidden", "activation", "epsilon")
        names += ("dropout", "dtype", "remat", "unroll")
        return {name: getattr(self, name) for name in names}


class BertEncoder(Sizes):
    """BERT without task heads.

    Attributes:
      vocabulary, positions, types: rows of the embedding tables; 0 = the table does not exist.
      pooler: also return the pooled first token.
      The others as in `Sizes`.
    """

    vocabulary: int = 0
    positions: int = 512
    types: int = 2
    pooler: bool = False

    @nn.compact
    def __call__(
        self,
        ids: Array | None = None,
        mask: Array | None = None,
        *,
        embeddings: Array | None = None,
        types: Array | None = None,
        train: bool = False,
    ) -> Array | tuple[Array, Array]:
        """Encodes token ids or embeddings (exactly one of the two).

        Args:
          ids: `[batch, tokens]` int32.
          mask: `[batch, tokens]` bool, True = a real token; None = all real. Outputs at padded
            positions are defined but mean nothing.
          embeddings: `[batch, tokens, width]`, used instead of the word table; position and
            type embeddings are still added.
          types: `[batch, tokens]` int32 token types; None = 0.
          train: switches dropout on.

        Returns:
          hidden states `[batch, tokens, width]` in `dtype`; with `pooler` also
          `[batch, width]`, tanh of a dense map of the first token.
        """
        if (ids is None) == (embeddings is None):
            raise ValueError("give either ids or embeddings")
        x = Embeddings(
            width=self.width,
            vocabulary=self.vocabulary,
            positions=self.positions,
            types=self.types,
            epsilon=self.epsilon,
            dropout=self.dropout,
            dtype=self.dtype,
            name="embeddings",
        )(ids, embeddings, types, train=train)
        mask = None if mask is None else mask.astype(bool)[:, None, None, :]
        x, _ = layers.stack(Layer, self.depth, broadcast=1, remat=self.remat, unroll=self.unroll)(
            heads=self.heads,
            hidden=self.hidden,
            activation=self.activation,
            epsilon=self.epsilon,
            dropout=self.dropout,
            dtype=self.dtype,
            train=train,
            name="layers",
        )(x, mask)
        if not self.pooler:
            return x
        return x, jnp.tanh(layers.Dense(self.width, dtype=self.dtype, name="pooler")(x[:, 0]))


SIZES = {
    # bert-base-chinese; bert-base-uncased has a vocabulary of 30522.
    "bert_base_chinese": dict(width=768, depth=12, heads=12, hidden=3072, vocabulary=21128),
    "tiny": dict(width=96, depth=4, heads=4, hidden=192, vocabulary=512, positions=128),
}

# One row per kind of parameter; `(.*/)?` so that the same rows fit wherever the module is mounted.
SHARDING = (
    (r"(.*/)?embeddings/words", PartitionSpec("tensor", "fsdp")),
    (r"(.*/)?embeddings/(positions|types)", PartitionSpec(None, "fsdp")),
    (r"(.*/)?layers/attention/(query|key|value)/kernel", PartitionSpec(None, "fsdp", "tensor")),
    (r"(.*/)?layers/attention/(query|key|value)/bias", PartitionSpec(None, "tensor")),
    (r"(.*/)?layers/attention/out/kernel", PartitionSpec(None, "tensor", None, "fsdp")),
    (r"(.*/)?layers/feed_forward/up/kernel", PartitionSpec(None, "fsdp", "tensor")),
    (r"(.*/)?layers/feed_forward/up/bias", PartitionSpec(None, "tensor")),
    (r"(.*/)?layers/feed_forward/down/kernel", PartitionSpec(None, "tensor", "fsdp")),
    (r"(.*/)?pooler/kernel", PartitionSpec("fsdp", "tensor")),
    (r"(.*/)?(.*norm/(scale|bias)|(out|down|pooler)/bias)", PartitionSpec()),
)
