"""The decoder of the stage-1 ASR model (`asr_search.py` decodes with it).

One decoding step per CIF embedding: a transformer reads the tokens so far together with the CIF
embeddings before them, and the token is predicted from its state and its own CIF embedding
(MingLunHan/CIF-HieraDist). The paper's multimodal decoder (appendix A.2) adds cross-attention:
blocks 3-4 to visual features (CLIP ViT-B/16), blocks 5-6 to linguistic ones (bert-base-chinese),
zero vectors where there is none. Without such blocks it is the decoder of the fork.
"""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from xllm_jax.models.dropout import Dropout
from xllm_jax.models.layers import Dense, FeedForward, LayerNorm, attention, recomputed

Array = jax.Array
Cache = dict[str, tuple[Array, Array]]

PAD, END = 1, 2  # fairseq's ids; decoding starts from END and is cut at END


class Context(NamedTuple):
    """What a decoder block may cross-attend: `[batch, rows, width]`, and which rows are real."""

    features: Array
    mask: Array | None = None


class CachedAttention(nn.Module):
    """Multi-head attention whose keys and values may come from a cache of earlier steps."""

    heads: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Array,
        memory: Array,
        mask: Array | None,
        cache: tuple[Array, Array] | None = None,
        step: Array | None = None,
    ) -> tuple[Array, tuple[Array, Array] | None]:
        """Attends from `x` to `memory`, or to the cache after writing `memory` into it.

        Args:
          x: `[batch, queries, width]`.
          memory: `[batch, keys, memory width]`.
          mask: bool, broadcastable to `[batch, heads, queries, keys]`.
          cache: keys and values `[batch, steps, heads, head_dim]`, or None.
          step: where `memory` (one key) goes in the cache.

        Returns:
          (`[batch, queries, width]`, the cache with this step's key and value).
        """
        width = x.shape[-1]
        split = (self.heads, width // self.heads)
        query, key, value = (
            Dense(split, dtype=self.dtype, kernel_init=uniform, tensor_axis=0, name=name)(source)
            for name, source in (("query", x), ("key", memory), ("value", memory))
        )
        if cache is not None and step is not None:

            def write(old: Array, new: Array) -> Array:
                return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), step, axis=1)

            key, value = cache = write(cache[0], key), write(cache[1], value)
        y = attention(query, key, value, mask)
        return Dense(width, inputs=2, dtype=self.dtype, kernel_init=merge, name="output")(y), cache


def uniform(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
    """Xavier initializer of `[inputs, *outputs]`.

    Args:
      key: random key.
      shape: of the parameter.
      dtype: of the parameter.
    """
    outputs = tuple(range(1, len(shape)))
    return nn.initializers.variance_scaling(1.0, "fan_avg", "uniform", out_axis=outputs, in_axis=0)(
        key, shape, dtype
    )


def merge(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
    """Xavier initializer of `[heads, head_dim, width]`.

    Args:
      key: random key.
      shape: of the parameter.
      dtype: of the parameter.
    """
    return nn.initializers.variance_scaling(1.0, "fan_avg", "uniform", in_axis=(0, 1))(
        key, shape, dtype
    )


class DecoderBlock(nn.Module):
    """Pre-norm block: self-attention, cross-attention where there is a context, feed-forward."""

    heads: int
    hidden: int
    dropout: float = 0.0
    train: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Array,
        cache: tuple[Array, Array] | None,
        step: Array | None,
        mask: Array | None,
        context: Context | None,
    ) -> tuple[Array, tuple[Array, Array] | None]:
        """Maps `[batch, tokens, width]`; the rest as in `CachedAttention`."""
        y = self.norm("self_norm")(x)
        attention = CachedAttention(self.heads, self.dtype, name="self_attention")
        y, cache = attention(y, y, mask, cache, step)
        x = x + self.drop(y)
        if context is not None:
            attention = CachedAttention(self.heads, self.dtype, name="cross_attention")
            seen = None if context.mask is None else context.mask[:, None, None]
            y, _ = attention(self.norm("cross_norm")(x), context.features, seen)
            x = x + self.drop(y)
        layer = FeedForward(self.hidden, nn.relu, self.dropout, self.dtype, name="feed_forward")
        return x + self.drop(layer(self.norm("feed_forward_norm")(x), self.train)), cache

    def norm(self, name: str) -> LayerNorm:
        return LayerNorm(1e-5, dtype=self.dtype, name=name)

    def drop(self, y: Array) -> Array:
        return Dropout(self.dropout)(y, self.train)


def sinusoids(positions: Array, width: int) -> Array:
    """fairseq's position vectors: `[...]` positions to `[..., width]`, sines, then cosines."""
    half = width // 2
    rates = jnp.exp(jnp.arange(half) * (-math.log(10000.0) / max(half - 1, 1)))
    angle = positions[..., None].astype(jnp.float32) * rates
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


class ASRDecoder(nn.Module):
    """Transformer decoder over CIF embeddings, with the CTC head of the speech encoder.

    Attributes:
      vocab: rows of the character vocabulary, special tokens included.
      width, hidden, heads: sizes of the blocks; `width` is also that of the CIF embeddings.
      self_blocks, visual_blocks, linguistic_blocks: number of blocks of each kind, in this order.
      visual_width, linguistic_width: widths of the contexts.
      dropout: rate after the embeddings and on every residual branch.
    """

    vocab: int
    width: int
    hidden: int
    heads: int
    self_blocks: int
    visual_blocks: int = 0
    linguistic_blocks: int = 0
    visual_width: int = 768
    linguistic_width: int = 768
    dropout: float = 0.1
    dtype: DTypeLike = jnp.float32
    unroll: int = 1
    remat: str = "none"

    def example(self) -> tuple[Array, Array, Array]:
        """Arguments for `init`."""
        embeddings = jnp.zeros((1, 2, self.width))
        return jnp.full((1, 2), END, jnp.int32), embeddings, embeddings

    @nn.compact
    def __call__(
        self,
        previous: Array,
        embeddings: Array,
        features: Array | None = None,
        visual: Context | None = None,
        linguistic: Context | None = None,
        train: bool = False,
    ) -> tuple[Array, Array | None]:
        """Teacher-forced logits.

        Args:
          previous: `[batch, tokens]` int32, the token before each position; END comes first.
          embeddings: `[batch, tokens, width]` CIF embeddings.
          features: `[batch, frames, width]` encoder outputs for the CTC head, or None.
          visual, linguistic: contexts; None = zero vectors.
          train: switches dropout on.

        Returns:
          float32 (`[batch, tokens, vocab]` logits, `[batch, frames, vocab]` CTC logits or None).
        """
        real = previous != PAD
        causal = jnp.tril(jnp.ones((previous.shape[1],) * 2, bool))
        shifted = jnp.pad(embeddings, ((0, 0), (1, 0), (0, 0)))[:, :-1]
        positions = jnp.arange(previous.shape[1])[None]
        x = self.combine(previous, shifted, positions, train)
        mask = (causal & real[:, None])[:, None]
        x, _ = self.blocks(x, mask, visual, linguistic, train)
        logits = self.head(x, embeddings)
        if features is None:
            return logits, None
        return logits, self.dense(self.vocab, "ctc", use_bias=True)(features).astype(jnp.float32)

    @nn.compact
    def step(
        self,
        previous: Array,
        embeddings: Array,
        cache: Cache,
        step: Array,
        visual: Context | None = None,
        linguistic: Context | None = None,
    ) -> tuple[Array, Cache]:
        """Logits of one more token.

        Args:
          previous: `[batch]` int32, the token before.
          embeddings: `[batch, steps, width]` all CIF embeddings.
          cache: keys and values of the steps before, of `init_cache`.
          step: int32 scalar, which token.
          visual, linguistic: as in `__call__`.

        Returns:
          (`[batch, vocab]` float32 logits, cache).
        """
        now = jax.lax.dynamic_slice_in_dim(embeddings, step, 1, axis=1)
        before = jax.lax.dynamic_slice_in_dim(embeddings, jnp.maximum(step - 1, 0), 1, axis=1)
        before = jnp.where(step > 0, before, 0)
        x = self.combine(previous[:, None], before, step[None, None], train=False)
        mask = (jnp.arange(embeddings.shape[1]) <= step)[None, None, None]
        x, cache = self.blocks(x, mask, visual, linguistic, False, cache, step)
        return self.head(x, now)[:, 0], cache

    def init_cache(self, batch: int, steps: int) -> Cache:
        """Empty keys and values of every self-attention, `[layers, batch, steps, heads, dim]`."""
        shape = (batch, steps, self.heads, self.width // self.heads)

        def zeros(depth: int) -> tuple[Array, Array]:
            return jnp.zeros((depth, *shape), self.dtype), jnp.zeros((depth, *shape), self.dtype)

        return {name: zeros(depth) for name, depth, _ in self.kinds()}

    def kinds(self) -> list[tuple[str, int, int]]:
        """(name, number of blocks, width of the context) of every kind that exists."""
        kinds = [
            ("self_blocks", self.self_blocks, 0),
            ("visual_blocks", self.visual_blocks, self.visual_width),
            ("linguistic_blocks", self.linguistic_blocks, self.linguistic_width),
        ]
        return [kind for kind in kinds if kind[1]]

    def dense(self, features: int, name: str, use_bias: bool = False) -> Dense:
        return Dense(features, use_bias=use_bias, dtype=self.dtype, kernel_init=uniform, name=name)

    def combine(self, previous: Array, shifted: Array, positions: Array, train: bool) -> Array:
        """Token, CIF embedding before it and position: `[batch, tokens, width]`.

        Args:
          previous: `[batch, tokens]` int32, the token before each.
          shifted: `[batch, tokens, width]`, the CIF embedding before each.
          positions: `[1, tokens]` int32.
          train: switches dropout on.
        """
        init = nn.initializers.normal(self.width**-0.5)
        table = self.param("embed", init, (self.vocab, self.width), jnp.float32)
        tokens = jnp.asarray(table)[previous].astype(self.dtype) * self.width**0.5
        # PAD trains neither its row nor a position of its own.
        real = (previous != PAD)[..., None]
        tokens = jnp.where(real, tokens, jax.lax.stop_gradient(tokens))
        x = jnp.concatenate([tokens, shifted.astype(self.dtype)], axis=-1)
        x = self.dense(self.width, "project_in")(x)
        place = jnp.where(real, sinusoids(positions + 1 + PAD, self.width), 0.0)
        return Dropout(self.dropout)(x + place.astype(self.dtype), train)

    def blocks(
        self,
        x: Array,
        mask: Array,
        visual: Context | None,
        linguistic: Context | None,
        train: bool,
        cache: Cache | None = None,
        step: Array | None = None,
    ) -> tuple[Array, Cache]:
        """Runs every kind of block over `x` `[batch, tokens, width]`.

        Args:
          x: `[batch, tokens, width]`.
          mask: bool, broadcastable to `[batch, heads, tokens, keys]`.
          visual, linguistic: contexts of the blocks of those kinds.
          train: switches dropout on.
          cache: keys and values of earlier steps, see `init_cache`.
          step: where this step's go in the cache.
        """
        contexts = {"visual_blocks": visual, "linguistic_blocks": linguistic}
        block, new = recomputed(DecoderBlock, self.remat), {}
        for name, depth, width in self.kinds():
            context = contexts.get(name)
            if width and context is None:
                context = Context(jnp.zeros((x.shape[0], 1, width), self.dtype))
            layers = nn.scan(
                block,
                variable_axes={"params": 0, "intermediates": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=cast(int, (0, nn.broadcast, nn.broadcast, nn.broadcast)),  # or a tuple
                length=depth,
                unroll=self.unroll,
            )(self.heads, self.hidden, self.dropout, train, self.dtype, name=name)
            x, new[name] = layers(x, None if cache is None else cache[name], step, mask, context)
        return LayerNorm(1e-5, dtype=self.dtype, name="norm")(x), new

    def head(self, x: Array, embeddings: Array) -> Array:
        """States and their CIF embeddings to `[batch, tokens, vocab]` float32 logits."""
        both = jnp.concatenate([x, embeddings.astype(self.dtype)], axis=-1)
        x = self.dense(self.width, "project_out")(both)
        return self.dense(self.vocab, "output")(x).astype(jnp.float32)


def previous_tokens(tokens: Array) -> Array:
    """Teacher-forcing inputs: END, then every token but the last; END becomes PAD behind the end.

    Args:
      tokens: `[batch, tokens]` int32 targets, END included, padded with PAD.
    """
    shifted = jnp.pad(tokens, ((0, 0), (1, 0)), constant_values=END)[:, :-1]
    return jnp.where(tokens == PAD, PAD, shifted)


SIZES = {
    "cif_asr": dict(
        vocab=4236, width=512, hidden=2048, heads=8, self_blocks=2, visual_blocks=2,
        linguistic_blocks=2,
    ),
    "tiny": dict(
        vocab=192, width=96, hidden=384, heads=4, self_blocks=2, visual_blocks=1,
        linguistic_blocks=1, visual_width=128, linguistic_width=96, dropout=0.0,
    ),
}  # fmt: skip

SHARDING = (
    (r"(.*/)?(self|cross)_attention/(query|key|value)/kernel", P(None, "fsdp", "tensor", None)),
    (r"(.*/)?(self|cross)_attention/output/kernel", P(None, "tensor", None, "fsdp")),
    (r"(.*/)?feed_forward/up/kernel", P(None, "fsdp", "tensor")),
    (r"(.*/)?feed_forward/down/kernel", P(None, "tensor", "fsdp")),
    (r"(.*/)?embed", P(None, "fsdp")),
    (r"(.*/)?(project_in|project_out|output|ctc)/kernel", P("fsdp", "tensor")),
    (r".*", P()),
)
