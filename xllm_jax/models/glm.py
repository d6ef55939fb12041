"""ChatGLM-6B: GLM's bidirectional context, two-dimensional rotary positions and scaled residuals.

Du et al. 2022 (arXiv 2103.10360) and `modeling_chatglm.py` of THUDM/chatglm-6b. A model of the LLM
kind is four methods: `embed(ids)`, `__call__(x, segments, context, positions, cache, watched)`,
`logits(x)` and `init_cache(batch, length, dtype, prefix)`; the rest of the project knows no more.
"""

from __future__ import annotations

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

# The reference builds every block with its default of 28 layers, whatever the model's depth is.
REFERENCE_ALPHA = (2 * 28) ** 0.5

# What the backward pass keeps of a layer besides its input: 2 * (6 width + hidden) bytes a token in
# bfloat16, 147 MB for 64 tokens of the real size, where plain autodiff keeps 3.7 times as much. The
# rest (norms, GELU, attention probabilities) is elementwise or small and is computed again.
KEPT = ("attention_inputs", "middle_stream", "hidden", gradients.STATISTICS)


def rotary_frequencies(channels: int) -> Array:
    """Angle per position of each channel pair, `[channels / 2]` float16.

    The reference's constructor rounds them to float16 even in float32 models, and at long
    distances that is seen in the logits.
    """
    exponent = jnp.arange(0, channels, 2, dtype=jnp.float32) / channels
    return (1.0 / 10000.0**exponent).astype(jnp.float16)


def rotary_table(positions: Array, channels: int, half: bool = False) -> tuple[Array, Array]:
    """Cosines and sines of one rotary half.

    Args:
      positions: `[...]` int32.
      channels: channels that are rotated; channel j pairs with channel j + channels / 2.
      half: round the angles, and then the tables, to float16, as a float16 model of the reference
        does.

    Returns:
      Two float32 arrays `[..., channels]`.
    """
    frequency = rotary_frequencies(channels).astype(jnp.float32)
    angle = positions[..., None].astype(jnp.float32) * frequency
    angle = jnp.concatenate([angle, angle], axis=-1)
    if not half:
        return jnp.cos(angle), jnp.sin(angle)
    angle = angle.astype(jnp.float16).astype(jnp.float32)
    cosine, sine = (f(angle).astype(jnp.float16) for f in (jnp.cos, jnp.sin))
    return cosine.astype(jnp.float32), sine.astype(jnp.float32)


def rotary_tables(positions: Array, head_dim: int, half: bool = False) -> tuple[Array, Array]:
    """Tables of both halves of a head: `[B, T, 2]` positions to two `[B, T, 1, head_dim]`.

    The first half of the channels turns with the position, the second with the block position.

    Args:
      positions: `[B, T, 2]` int32, position and block position.
      head_dim: channels of a head.
      half: round the tables to half precision, as the published code does.
    """
    tables = [rotary_table(positions[..., axis], head_dim // 2, half) for axis in (0, 1)]
    cosine, sine = (jnp.concatenate(pair, axis=-1)[..., None, :] for pair in zip(*tables))
    return cosine, sine


def rotate(x: Array, cosine: Array, sine: Array) -> Array:
    """Rotates `[B, T, heads, head_dim]` by `rotary_tables`, in float32, returned in x's dtype.

    Args:
      x: queries or keys.
      cosine, sine: `[B, T, 1, head_dim]`.
    """
    turned = rotary.turned(x, x.shape[-1] // 2)
    return (x.astype(jnp.float32) * cosine + turned * sine).astype(x.dtype)


def _activation(x: Array) -> Array:
    return basic.gelu_tanh(checkpoint_name(x, KEPT[2]))


class Attention(nn.Module):
    """Self-attention with rotary queries and keys; `memory` holds the keys and values to extend."""

    heads: int
    implementation: basic.Kernel | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Array, tables: tuple[Array, Array], mask: Array, slots: Array, memory: Memory
    ) -> tuple[Array, Memory]:
        """`x [B, T, D]`; memory is None or (layer number, keys, values). Returns (y, memory)."""
        width = x.shape[-1]
        shape = (3, self.heads, width // self.heads)
        qkv = basic.Dense(shape, dtype=self.dtype, tensor_axis=1, name="qkv")(x)
        query, key, value = (qkv[..., i, :, :] for i in range(3))
        query, key = rotate(query, *tables), rotate(key, *tables)
        query, key, value = (checkpoint_name(x, KEPT[0]) for x in (query, key, value))
        if memory is not None:
            layer, keys, values = memory
            keys, key = store(keys, layer, slots, key)
            values, value = store(values, layer, slots, value)
            memory = (layer + 1, keys, values)
        y = basic.attention(query, key, value, mask, implementation=self.implementation)
        return basic.Dense(width, inputs=2, dtype=self.dtype, name="out")(y), memory


class Block(nn.Module):
    """One layer. Its residual is the *normalized* input times alpha, not the input itself."""

    heads: int
    hidden: int
    alpha: float
    norm_epsilon: float
    implementation: basic.Kernel | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        carry: tuple[Array, Memory],
        tables: tuple[Array, Array],
        mask: Array,
        slots: Array,
        watched: Array | None,
    ) -> tuple[tuple[Array, Memory], Array | None]:
        x, memory = carry
        seen = None if watched is None else jnp.take_along_axis(x, watched[..., None], axis=1)
        attention = Attention(self.heads, self.implementation, self.dtype, name="attention")
        feed_forward = basic.FeedForward(
            self.hidden, _activation, dtype=self.dtype, name="feed_forward"
        )
        normed = self._norm("attention_norm")(x)
        y, memory = attention(gradients.apart(normed), tables, mask, slots, memory)
        x = checkpoint_name(self._residual(normed, y), KEPT[1])
        normed = self._norm("feed_forward_norm")(x)
        return (self._residual(normed, feed_forward(gradients.apart(normed))), memory), seen

    def _norm(self, name: str) -> nn.Module:
        return basic.LayerNorm(self.norm_epsilon, self.dtype, name=name)

    def _residual(self, normed: Array, y: Array) -> Array:
        # In float32, because alpha itself is not a half-precision number.
        y = normed.astype(jnp.float32) * self.alpha + y.astype(jnp.float32)
        return y.astype(self.dtype)


class ChatGLM(nn.Module):
    """The whole LLM; its head is the transposed word embedding.

    Attributes:
      vocab, width, depth, heads, hidden: vocabulary size, D, number of layers, heads, inner width.
      alpha: factor of the residual; None is the reference's (2 * 28) ** 0.5, whatever the depth.
      norm_epsilon: of every LayerNorm.
      half_angles: rotary tables as a float16 model of the reference computes them.
      implementation: of the attention, see `layers.attention`.
      dtype: compute dtype; unroll: see `layers.stack`.
      remat: 'all' keeps nothing but each layer's input for the backward pass (else see KEPT).
    """

    vocab: int
    width: int
    depth: int
    heads: int
    hidden: int
    alpha: float | None = None
    norm_epsilon: float = 1e-5
    half_angles: bool = False
    implementation: basic.Kernel | None = None
    dtype: DTypeLike = jnp.float32
    remat: str = "none"
    unroll: int = 1

    position_axes: ClassVar = 2  # numbers to a token's position

    def setup(self) -> None:
        self.embedding = self.param(
            "embedding", basic.truncated_normal(), (self.vocab, self.width), jnp.float32
        )
        names = () if self.remat == "all" else KEPT
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        block = nn.remat(Block, prevent_cse=False, policy=policy)
        self.layers = basic.stack(block, self.depth, broadcast=4, unroll=self.unroll)(
            heads=self.heads,
            hidden=self.hidden,
            alpha=REFERENCE_ALPHA if self.alpha is None else self.alpha,
            norm_epsilon=self.norm_epsilon,
            implementation=self.implementation,
            dtype=self.dtype,
        )
        self.final_norm = basic.LayerNorm(self.norm_epsilon, self.dtype)

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
          context: `[B, T]` bool, belongs to the bidirectional context of its segment.
          positions: `[B, T, 2]` int32, position and block position.
          cache: earlier tokens of the rows (`init_cache`), or None. Tokens that are fed together
            with context see each other fully, so a context must be fed in one call.
          watched: `[B, S]` int32, positions whose states between the layers are also wanted.

        Returns:
          (`[B, T, D]` after the final norm, the input of `logits`; the extended cache or None; and
          with `watched` also `[L, B, S, D]`, what each layer read there).
        """
        x = x.astype(self.dtype)
        tables = rotary_tables(positions, self.width // self.heads, self.half_angles)
        if cache is None:
            slots = jnp.broadcast_to(jnp.arange(x.shape[1]), segments.shape)
            mask = visible(segments, slots, segments, context, slots)
            (x, _), seen = self.layers((x, None), tables, mask, slots, watched)
            made = (self.final_norm(x), None)
            return made if watched is None else (*made, seen)
        cache, slots = extend_cache(cache, segments, context)
        places = jnp.broadcast_to(jnp.arange(cache["segments"].shape[1]), cache["segments"].shape)
        mask = visible(segments, slots, cache["segments"], cache["context"], places)
        memory = (jnp.int32(0), cache["key"], cache["value"])
        (x, (_, key, value)), seen = self.layers((x, memory), tables, mask, slots, watched)
        made = (self.final_norm(x), cache | {"key": key, "value": value})
        return made if watched is None else (*made, seen)

    def logits(self, x: Array) -> Array:
        """Scores of the next token: `[..., D]` final states to `[..., vocab]` float32."""
        return word_table.logits(self.embedding, x, self.dtype)

    def example(self) -> tuple[Array, Array, Array, Array]:
        """Arguments for `init`."""
        row = jnp.ones((1, 2), jnp.int32)
        return jnp.zeros((1, 2, self.width)), row, row > 0, jnp.zeros((1, 2, 2), jnp.int32)

    def init_cache(
        self, batch: int, length: int, dtype: DTypeLike | None = None, prefix: Array | None = None
    ) -> Cache:
        """A cache for `batch` rows of at most `length` tokens, empty or begun by a prefix.

        Args:
          batch, length: rows, and tokens of each.
          dtype: of keys and values, the compute dtype when None.
          prefix: keys and values `[L, 2, P, heads, head_dim]` (`glm_prefix.py`) that every token
            of every row sees. They have no position, so the tokens keep theirs.

        Returns:
          See `decoder_cache.empty_cache`.
        """
        heads = (self.heads, self.width // self.heads)
        return empty_cache((self.depth, batch, length, *heads), dtype or self.dtype, prefix)


SIZES = {
    "chatglm_6b": dict(vocab=130528, width=4096, depth=28, heads=32, hidden=16384),
    "real_150528": dict(vocab=150528, width=4096, depth=28, heads=32, hidden=16384),
    "tiny": dict(vocab=512, width=128, depth=5, heads=4, hidden=512),
}

SHARDING = (
    (r"embedding", P("tensor", "fsdp")),
    (r"layers/attention/qkv/kernel", P(None, "fsdp", None, "tensor", None)),
    (r"layers/attention/qkv/bias", P(None, None, "tensor", None)),
    (r"layers/attention/out/kernel", P(None, "tensor", None, "fsdp")),
    (r"layers/attention/out/bias", P(None, None)),
    (r"layers/feed_forward/up/kernel", P(None, "fsdp", "tensor")),
    (r"layers/feed_forward/up/bias", P(None, "tensor")),
    (r"layers/feed_forward/down/kernel", P(None, "tensor", "fsdp")),
    (r"layers/feed_forward/down/bias", P(None, None)),
    (r"layers/(attention|feed_forward)_norm/(scale|bias)", P(None, None)),
    (r"final_norm/(scale|bias)", P(None)),
)

# May stay in the host's memory: each layer fetches its own. (The TPU compiler cannot take a layer's
# row of bfloat16 biases from there; they are small.)
STREAMED = (r"layers/.*/kernel",)
