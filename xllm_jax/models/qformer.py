"""Q-Former (BLIP-2, arXiv 2301.12597): queries that read image features, with or without text.

It is post-norm BERT in which query rows and text rows share self-attention, only query rows attend
to the image (in every `cross_attention_frequency`-th layer, from the first on), and each kind has a
feed-forward of its own. `contrast.py` adds the heads of BLIP-2's first stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec

from xllm_jax.models import bert, layers

Array = jax.Array
Cache = dict[str, Any]


def visible(
    queries: int, text_mask: Array | None, *, causal: bool = False, cached: bool = False
) -> Array | None:
    """Who sees whom in self-attention.

    Args:
      queries: number of query rows.
      text_mask: `[batch, tokens]` bool, True = a real token; None = there is no text.
      causal: captioning: queries see only queries, a token sees the queries and what is not behind
        it. Otherwise everything sees every query and every real token.
      cached: the query rows are not computed again, only their keys are there.

    Returns:
      `[batch, 1, rows, queries + tokens]` bool, rows without the queries when `cached`; None when
      everything is visible.
    """
    if text_mask is None:
        return None
    tokens = text_mask.shape[1]
    keys = jnp.pad(text_mask.astype(bool), ((0, 0), (queries, 0)), constant_values=True)
    mask = keys[:, None, None, :]
    if causal:
        place = jnp.arange(queries + tokens)
        order = (place[None, :] <= place[:, None]) | (place[None, :] < queries)
        mask = mask & order
    else:
        mask = jnp.broadcast_to(mask, (mask.shape[0], 1, queries + tokens, queries + tokens))
    return mask[:, :, queries:] if cached else mask


class Layer(nn.Module):
    """One layer: self-attention, cross-attention of the queries, feed-forward per kind of row."""

    queries: int
    heads: int
    hidden: int
    epsilon: float
    dropout: float
    dtype: Any
    train: bool
    cross: bool

    @nn.compact
    def __call__(
        self,
        x: Array,
        mask: Array | None,
        features: Array | None,
        feature_mask: Array | None,
        prefix: tuple[Array, Array] | None,
    ) -> tuple[Array, tuple[Array, Array]]:
        """Maps `[batch, rows, width]`; the first `queries` rows are queries.

        Returns:
          new rows, and the keys and values of self-attention `[batch, rows, heads, head_dim]`.
        """
        y, cache = self._attention("attention")(x, x, mask, prefix, self.train)
        x = self._end("attention", x, y)
        query, text = x[:, : self.queries], x[:, self.queries :]
        parts = []
        if query.shape[1]:
            if self.cross:
                attend = self._attention("cross_attention")
                y, _ = attend(query, features, feature_mask, train=self.train)
                query = self._end("cross_attention", query, y)
            parts.append(self._feed_forward("query_feed_forward", query))
        if text.shape[1]:
            parts.append(self._feed_forward("text_feed_forward", text))
        return jnp.concatenate(parts, axis=1) if len(parts) > 1 else parts[0], cache

    def _attention(self, name: str) -> bert.Attention:
        return bert.Attention(self.heads, self.dropout, self.dtype, name=name)

    def _feed_forward(self, name: str, x: Array) -> Array:
        block = layers.FeedForward(self.hidden, layers.gelu_exact, dtype=self.dtype, name=name)
        return self._end(name, x, block(x))

    def _end(self, name: str, x: Array, y: Array) -> Array:
        end = bert.Residual(self.epsilon, self.dropout, self.dtype, name=f"{name}_end")
        return end(x, y, self.train)


class Group(nn.Module):
    """A layer with cross-attention and the layers without it that follow; the scan block."""

    length: int
    keep_cache: bool
    fields: Mapping[str, Any]

    @nn.compact
    def __call__(
        self,
        x: Array,
        mask: Array | None,
        features: Array | None,
        feature_mask: Array | None,
        prefix: tuple[Any, ...] | None,
    ) -> tuple[Array, tuple[Any, ...] | None]:
        """As `Layer`; `prefix` and the returned cache hold one entry per layer of the group."""
        cache = []
        for number in range(self.length):
            layer = Layer(**self.fields, cross=number == 0, name=f"layer_{number}")
            one = None if prefix is None else prefix[number]
            x, keys = layer(x, mask, features, feature_mask, one)
            cache.append(keys)
        return x, tuple(cache) if self.keep_cache else None


class QFormer(nn.Module):
    """Queries and text over image features.

    Attributes:
      width, depth, heads, hidden: sizes of the stack (`hidden`: feed-forward).
      cross_attention_frequency: layers 0, f, 2f ... attend to the image.
      vocabulary, positions: rows of the text tables; 0 = no text branch.
      epsilon: of every norm.
      dropout: rate of all dropouts in training.
      remat: recompute groups in the backward pass.
      unroll: groups per scan step.
    """

    width: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int = 3072
    cross_attention_frequency: int = 2
    vocabulary: int = 0
    positions: int = 0
    epsilon: float = 1e-12
    dropout: float = 0.1
    dtype: Any = jnp.float32
    remat: bool = False
    unroll: int = 1

    @nn.compact
    def __call__(
        self,
        queries: Array | None = None,
        features: Array | None = None,
        feature_mask: Array | None = None,
        ids: Array | None = None,
        text_mask: Array | None = None,
        *,
        cache: Cache | None = None,
        causal: bool = False,
        keep_cache: bool = False,
        train: bool = False,
    ) -> tuple[Array, Cache | None]:
        """Runs queries over an image, text alone, both together, or text behind cached queries.

        Args:
          queries: `[batch, queries, width]`, or None (text alone, or text with `cache`).
          features: `[batch, patches, encoder width]` that the queries read.
          feature_mask: `[batch, patches]` bool; None = all patches are real.
          ids: `[batch, tokens]` int32 text, or None.
          text_mask: `[batch, tokens]` bool, True = a real token; needed with `ids`.
          cache: what an earlier call with `keep_cache` on the queries returned.
          causal: captioning, see `visible`.
          keep_cache: return the keys and values of self-attention.
          train: switches dropout on.

        Returns:
          rows `[batch, queries + tokens, width]` in `dtype`, cache or None.
        """
        rows = 0 if queries is None else queries.shape[1]
        x = bert.Embeddings(
            width=self.width,
            vocabulary=self.vocabulary,
            positions=self.positions,
            epsilon=self.epsilon,
            dropout=self.dropout,
            dtype=self.dtype,
            name="embeddings",
        )(ids, prefix=queries, train=train)
        before = 0 if cache is None else jax.tree.leaves(cache)[0].shape[-3]
        mask = visible(rows + before, text_mask, causal=causal, cached=cache is not None)
        if feature_mask is not None:
            feature_mask = feature_mask.astype(bool)[:, None, None, :]
        return self._groups(x, mask, features, feature_mask, cache, rows, keep_cache, train)

    def _groups(
        self,
        x: Array,
        mask: Array | None,
        features: Array | None,
        feature_mask: Array | None,
        cache: Cache | None,
        rows: int,
        keep_cache: bool,
        train: bool,
    ) -> tuple[Array, Cache | None]:
        """The whole groups as one scan, then a shorter group where the depth leaves one."""
        fields = {name: getattr(self, name) for name in ("heads", "hidden", "epsilon", "dropout")}
        fields |= {"queries": rows, "dtype": self.dtype, "train": train}
        count, rest = divmod(self.depth, self.cross_attention_frequency)
        cache, kept = cache or {}, {}
        if count:
            stack = layers.stack(
                Group, count, broadcast=3, scanned=1, remat=self.remat, unroll=self.unroll
            )
            group = stack(self.cross_attention_frequency, keep_cache, fields, name="groups")
            x, kept["groups"] = group(x, mask, features, feature_mask, cache.get("groups"))
        if rest:
            group = layers.stack(Group, 1, broadcast=3, scanned=1, remat=self.remat)
            group = group(rest, keep_cache, fields, name="tail")
            x, kept["tail"] = group(x, mask, features, feature_mask, cache.get("tail"))
        return x, kept if keep_cache else None


SIZES = {
    "real": dict(width=768, depth=12, heads=12, hidden=3072),
    "tiny": dict(width=96, depth=4, heads=4, hidden=192),
}

_ATTENTION = r"(.*/)?layer_\d+/(cross_)?attention/"
_FEED_FORWARD = r"(.*/)?layer_\d+/(query|text)_feed_forward/"

SHARDING = (
    (r"(.*/)?embeddings/words", PartitionSpec("tensor", "fsdp")),
    (r"(.*/)?embeddings/positions", PartitionSpec(None, "fsdp")),
    (r"(.*/)?embeddings/norm/(scale|bias)", PartitionSpec()),
    (_ATTENTION + "(query|key|value)/kernel", PartitionSpec(None, "fsdp", "tensor")),
    (_ATTENTION + "(query|key|value)/bias", PartitionSpec(None, "tensor")),
    (_ATTENTION + "out/kernel", PartitionSpec(None, "tensor", None, "fsdp")),
    (_FEED_FORWARD + "up/kernel", PartitionSpec(None, "fsdp", "tensor")),
    (_FEED_FORWARD + "up/bias", PartitionSpec(None, "tensor")),
    (_FEED_FORWARD + "down/kernel", PartitionSpec(None, "tensor", "fsdp")),
    (r"(.*/)?layer_\d+/.*(out/bias|down/bias|norm/(scale|bias))", PartitionSpec()),
)
