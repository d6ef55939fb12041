"""Causal decoders: LLaMA 1 to 3 and Vicuna, Qwen 2 and 3, GLM-4.

One network with choices: grouped-query attention, biases of queries, keys and values (Qwen2), norms
of queries and keys (Qwen3), rotary positions on a part of the channels and norms behind attention
and feed-forward (GLM-4), a head of its own or the tied word embedding. The four methods of the LLM
kind are told in `models/glm.py`. There is no sliding window.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from xllm_jax.models import gradients, rotary, word_table
from xllm_jax.models import layers as basic
from xllm_jax.models.decoder_cache import Cache, Memory, empty_cache, extend_cache, store, visible

Array = jax.Array
Tables = tuple[Array, Array]

# What the backward pass keeps of a layer besides its input; norms, rotations, products of gates and
# attention probabilities are elementwise or small and are computed again.
KEPT = ("attention_inputs", "attention_output", "middle_stream", "hidden")


class RMSNorm(nn.Module):
    """Division by the root mean square of the last axis, in float32, returned in `dtype`."""

    epsilon: float = 1e-6
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones_init(), x.shape[-1:], jnp.float32)
        x = x.astype(jnp.float32)
        mean = jnp.square(x).mean(-1, keepdims=True)
        return (x * jax.lax.rsqrt(mean + self.epsilon) * scale.astype(jnp.float32)).astype(
            self.dtype
        )


def grouped_attention(
    query: Array, key: Array, value: Array, mask: Array, implementation: basic.Kernel | None
) -> Array:
    """Attention in which several heads of queries share a head of keys and values.

    Args:
      query: `[B, Q, heads, head_dim]`; heads of one group are neighbors.
      key, value: `[B, K, key_heads, head_dim]`.
      mask: `[B, 1, Q, K]` bool.
      implementation: see `layers.attention`.

    Returns:
      `[B, Q, heads, head_dim]`.
    """
    batch, queries, heads, channels = query.shape
    groups = heads // key.shape[2]
    if groups == 1 or implementation is not None:
        return basic.attention(query, key, value, mask, implementation=implementation)
    # The heads of a group become further queries of their keys.
    apart = query.reshape(batch, queries, -1, groups, channels).swapaxes(2, 3)
    apart = apart.reshape(batch, queries * groups, -1, channels)
    y = basic.attention(apart, key, value, jnp.repeat(mask, groups, axis=2))
    y = y.reshape(batch, queries, groups, -1, channels).swapaxes(2, 3)
    return y.reshape(query.shape)


@dataclasses.dataclass(frozen=True)
class Heads:
    """Shapes of an attention; see the fields of `Causal`."""

    queries: int
    keys: int
    channels: int
    bias: bool
    normed: bool


class Attention(nn.Module):
    """Self-attention with rotary queries and keys; `memory` holds the keys and values to extend."""

    heads: Heads
    norm_epsilon: float
    implementation: basic.Kernel | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Array, tables: Tables, mask: Array, slots: Array, memory: Memory
    ) -> tuple[Array, Memory]:
        """`x [B, T, D]`; memory is None or (layer number, keys, values). Returns (y, memory)."""
        query = self._project("query", x, self.heads.queries)
        key = self._project("key", x, self.heads.keys)
        value = self._project("value", x, self.heads.keys)
        if self.heads.normed:
            query = RMSNorm(self.norm_epsilon, self.dtype, name="query_norm")(query)
            key = RMSNorm(self.norm_epsilon, self.dtype, name="key_norm")(key)
        query, key = rotary.rotate(query, *tables), rotary.rotate(key, *tables)
        if memory is not None:
            layer, keys, values = memory
            keys, key = store(keys, layer, slots, key)
            values, value = store(values, layer, slots, value)
            memory = (layer + 1, keys, values)
        y = grouped_attention(query, key, value, mask, self.implementation)
        out = basic.Dense(x.shape[-1], 2, use_bias=False, dtype=self.dtype, name="out")
        return out(y), memory

    def _project(self, name: str, x: Array, count: int) -> Array:
        shape, bias = (count, self.heads.channels), self.heads.bias
        dense = basic.Dense(shape, use_bias=bias, dtype=self.dtype, tensor_axis=0, name=name)
        return checkpoint_name(dense(x), KEPT[0])


class GatedFeedForward(nn.Module):
    """`down(silu(gate(x)) * up(x))`, without biases."""

    hidden: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps `[B, T, D]`."""

        def dense(features: int, axis: int | None, name: str) -> basic.Dense:
            return basic.Dense(
                features, use_bias=False, dtype=self.dtype, tensor_axis=axis, name=name
            )

        gate, up = (
            gradients.apart(checkpoint_name(dense(self.hidden, 0, name)(x), KEPT[3]))
            for name in ("gate", "up")
        )
        return dense(x.shape[-1], None, "down")(jax.nn.silu(gate) * up)


class Block(nn.Module):
    """One layer; `sandwich` norms what attention and feed-forward add to the stream."""

    heads: Heads
    hidden: int
    sandwich: bool
    norm_epsilon: float
    implementation: basic.Kernel | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        carry: tuple[Array, Memory],
        tables: Tables,
        mask: Array,
        slots: Array,
        watched: Array | None,
    ) -> tuple[tuple[Array, Memory], Array | None]:
        x, memory = carry
        seen = None if watched is None else jnp.take_along_axis(x, watched[..., None], axis=1)
        attention = Attention(
            self.heads, self.norm_epsilon, self.implementation, self.dtype, name="attention"
        )
        normed = self._norm("attention_norm")(x)
        y, memory = attention(gradients.apart(normed), tables, mask, slots, memory)
        x = checkpoint_name(self._added(x, y, "attention_output_norm"), KEPT[2])
        y = GatedFeedForward(self.hidden, self.dtype, name="feed_forward")(
            gradients.apart(self._norm("feed_forward_norm")(x))
        )
        return (self._added(x, y, "feed_forward_output_norm"), memory), seen

    def _norm(self, name: str) -> nn.Module:
        return RMSNorm(self.norm_epsilon, self.dtype, name=name)

    def _added(self, x: Array, y: Array, norm: str) -> Array:
        """What a half of the layer gives, added to the stream."""
        if self.sandwich:
            y = self._norm(norm)(checkpoint_name(y, KEPT[1]))
        return x + y


class Causal(nn.Module):
    """The whole LLM.

    Attributes:
      vocab, width, depth, heads, hidden: vocabulary size, D, number of layers, heads, inner width.
      key_heads: heads of keys and values; None = as many as `heads`.
      head_dim: channels of a head; None = width / heads.
      norm_epsilon: of every norm.
      qkv_bias: queries, keys and values have a bias.
      head_norms: queries and keys are normed in each head.
      sandwich: what attention and feed-forward give is normed too.
      tied: the head is the word embedding.
      theta: base of the rotary frequencies.
      rotary_share: part of a head's channels that is rotated.
      scaling: of the frequencies, see `rotary.make`.
      implementation: of the attention, see `layers.attention`.
      dtype: compute dtype; unroll: see `layers.stack`.
      remat: 'all' keeps nothing but each layer's input for the backward pass (else see KEPT).
    """

    vocab: int
    width: int
    depth: int
    heads: int
    hidden: int
    key_heads: int | None = None
    head_dim: int | None = None
    norm_epsilon: float = 1e-6
    qkv_bias: bool = False
    head_norms: bool = False
    sandwich: bool = False
    tied: bool = False
    theta: float = 10000.0
    rotary_share: float = 1.0
    scaling: Mapping[str, float | str] = nn.FrozenDict()
    implementation: basic.Kernel | None = None
    dtype: DTypeLike = jnp.float32
    remat: str = "none"
    unroll: int = 1

    position_axes: ClassVar = 1  # numbers to a token's position

    def setup(self) -> None:
        shape, normal = (self.vocab, self.width), basic.truncated_normal()
        self.embedding = self.param("embedding", normal, shape, jnp.float32)
        if not self.tied:
            self.head = self.param("head", normal, shape, jnp.float32)
        names = () if self.remat == "all" else KEPT
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        block = nn.remat(Block, prevent_cse=False, policy=policy)
        self.layers = basic.stack(block, self.depth, broadcast=4, unroll=self.unroll)(
            heads=Heads(
                queries=self.heads,
                keys=self.key_heads or self.heads,
                channels=self.channels,
                bias=self.qkv_bias,
                normed=self.head_norms,
            ),
            hidden=self.hidden,
            sandwich=self.sandwich,
            norm_epsilon=self.norm_epsilon,
            implementation=self.implementation,
            dtype=self.dtype,
        )
        self.final_norm = RMSNorm(self.norm_epsilon, self.dtype)

    @property
    def channels(self) -> int:
        """Channels of a head."""
        return self.head_dim or self.width // self.heads

    @property
    def rotation(self) -> rotary.Rotary:
        """Its rotary positions.

        Raises:
          UserError: `scaling` is not one of `rotary.KINDS`.
        """
        return rotary.make(int(self.channels * self.rotary_share), self.theta, self.scaling)

    def embed(self, ids: Array) -> Array:
        """Word embeddings: `[B, T]` int32 to `[B, T, D]` in the compute dtype."""
        return word_table.embed(self.embedding, ids, self.dtype)

    def __call__(
        self,
        x: Array,
        segments: Array,
        context: Array,
        positions: Array,
        cache: Cache | None = None,
        watched: Array | None = None,
    ) -> tuple[Array, Cache | None] | tuple[Array, Cache | None, Array]:
        """Runs the layers.

        Args:
          x: `[B, T, D]` word and media embeddings.
          segments: `[B, T]` int32, 0 = padding; different segments do not see each other.
          context: `[B, T]` bool, seen by the whole segment; False everywhere is causal.
          positions: `[B, T, 1]` int32.
          cache: earlier tokens of the rows (`init_cache`), or None.
          watched: `[B, S]` int32, positions whose states between the layers are also wanted.

        Returns:
          (`[B, T, D]` after the final norm, the input of `logits`; the extended cache or None; and
          with `watched` also `[L, B, S, D]`, what each layer read there).
        """
        x = x.astype(self.dtype)
        tables = self.rotation.tables(positions[..., 0])
        memory: Memory = None
        keys, slots = {"segments": segments, "context": context}, _places(segments)
        if cache is not None:
            cache, slots = extend_cache(cache, segments, context)
            keys, memory = cache, (jnp.int32(0), cache["key"], cache["value"])
        places = _places(keys["segments"])
        mask = visible(segments, slots, keys["segments"], keys["context"], places)
        (x, memory), seen = self.layers((x, memory), tables, mask, slots, watched)
        if cache is not None and memory is not None:
            cache = cache | {"key": memory[1], "value": memory[2]}
        made = (self.final_norm(x), cache)
        return made if watched is None else (*made, seen)

    def logits(self, x: Array) -> Array:
        """Scores of the next token: `[..., D]` final states to `[..., vocab]` float32."""
        table = self.embedding if self.tied else self.head
        return word_table.logits(table, x, self.dtype)

    def example(self) -> tuple[Array, Array, Array, Array]:
        """Arguments for `init`."""
        row = jnp.ones((1, 2), jnp.int32)
        return jnp.zeros((1, 2, self.width)), row, row > 0, jnp.zeros((1, 2, 1), jnp.int32)

    def init_cache(
        self, batch: int, length: int, dtype: DTypeLike | None = None, prefix: Array | None = None
    ) -> Cache:
        """A cache for `batch` rows of at most `length` tokens, empty or begun by a prefix.

        Args and result are those of `ChatGLM.init_cache`, with `key_heads` heads.
        """
        heads = (self.key_heads or self.heads, self.channels)
        return empty_cache((self.depth, batch, length, *heads), dtype or self.dtype, prefix)


def _places(segments: Array) -> Array:
    return jnp.broadcast_to(jnp.arange(segments.shape[1]), segments.shape)


SIZES = {
    "vicuna_7b": dict(vocab=32000, width=4096, depth=32, heads=32, hidden=11008),
    "llama3_8b": dict(
        vocab=128256,
        width=4096,
        depth=32,
        heads=32,
        hidden=14336,
        key_heads=8,
        norm_epsilon=1e-5,
        theta=500000.0,
    ),
    "qwen2_5_7b": dict(
        vocab=152064,
        width=3584,
        depth=28,
        heads=28,
        hidden=18944,
        key_heads=4,
        qkv_bias=True,
        theta=1000000.0,
    ),
    "qwen3_8b": dict(
        vocab=151936,
        width=4096,
        depth=36,
        heads=32,
        hidden=12288,
        key_heads=8,
        head_dim=128,
        head_norms=True,
        theta=1000000.0,
    ),
    "glm4_9b": dict(
        vocab=151552,
        width=4096,
        depth=40,
        heads=32,
        hidden=13696,
        key_heads=2,
        norm_epsilon=1e-5,
        qkv_bias=True,
        sandwich=True,
        rotary_share=0.5,
    ),
    "tiny": dict(vocab=576, width=128, depth=5, heads=4, hidden=352, key_heads=2),
}

SHARDING = (
    (r"embedding|head", P("tensor", "fsdp")),
    (r"layers/attention/(query|key|value)/kernel", P(None, "fsdp", "tensor", None)),
    (r"layers/attention/out/kernel", P(None, "tensor", None, "fsdp")),
    (r"layers/feed_forward/(gate|up)/kernel", P(None, "fsdp", "tensor")),
    (r"layers/feed_forward/down/kernel", P(None, "tensor", "fsdp")),
    (r".*_norm/scale|layers/attention/.*/bias", P()),
)

# May stay in the host's memory: each layer fetches its own, see `models/glm.py`.
STREAMED = (r"layers/.*/kernel",)
