"""Q-Former (BLIP-2, arXiv 2301.12597): queries that read image features, with or without text.

It is post-norm BERT in which query rows and text rows share self-attention, only query rows attend
to the image (in every `cross_attention_frequency`-th layer, from the first on), and each kind has a
feed-forward of its own. `contrast.py` adds the heads of BLIP-2's first stage.
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

from xllm_jax.models import bert, layers

Array = jax.Array
Cache = dict[str, Any]
KeysValues = tuple[Array, Array]  # of an attention

IMAGES = "images"  # entry of a cache: keys and values of the image features


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


def shared_images(kept: tuple[Array, Array], key: Array, value: Array) -> tuple[Array, Array]:
    """Keys and values for three rows an image: its own, another image's, and its own again.

    Args:
      kept: of the images themselves, `[images, patches, heads, head_dim]` each.
      key, value: of the other images, the same shape.

    Returns:
      keys and values `[3 * images, patches, heads, head_dim]`; rows of an image stay side by side,
      so that a device that holds an image holds them too.
    """
    return interleave(kept[0], key, kept[0]), interleave(kept[1], value, kept[1])


def interleave(*rows: Array) -> Array:
    """Arrays `[n, ...]` to one `[n * arrays, ...]`: the first rows of all, the second ones, ..."""
    return jnp.stack(rows, axis=1).reshape(-1, *rows[0].shape[1:])


class Layer(nn.Module):
    """One layer: self-attention, cross-attention of the queries, feed-forward per kind of row."""

    queries: int
    heads: int
    hidden: int
    activation: str
    epsilon: float
    dropout: float
    dtype: DTypeLike
    train: bool
    cross: bool

    @nn.compact
    def __call__(
        self,
        x: Array,
        mask: Array | None,
        features: Array | None,
        feature_mask: Array | None,
        prefix: KeysValues | None,
        kept: KeysValues | None,
    ) -> tuple[Array, KeysValues, KeysValues | None]:
        """Maps `[batch, rows, width]`; the first `queries` rows are queries.

        Returns:
          new rows, keys and values of self-attention `[batch, rows, heads, head_dim]`, and those of
          the image `[batch, patches, heads, head_dim]` where the layer reads it.
        """
        y, cache = self._attention("attention")(x, x, mask, prefix, self.train)
        x = self._end("attention", x, y)
        query, text = x[:, : self.queries], x[:, self.queries :]
        parts, image = [], None
        if query.shape[1]:
            if self.cross and features is not None:
                attend = self._attention("cross_attention")
                seen = None if kept is None else functools.partial(shared_images, kept)
                y, image = attend(query, features, feature_mask, train=self.train, seen=seen)
                query = self._end("cross_attention", query, y)
            parts.append(self._feed_forward("query_feed_forward", query))
        if text.shape[1]:
            parts.append(self._feed_forward("text_feed_forward", text))
        x = jnp.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]
        return x, cache, image

    def _attention(self, name: str) -> bert.Attention:
        return bert.Attention(self.heads, self.dropout, self.dtype, name=name)

    def _feed_forward(self, name: str, x: Array) -> Array:
        activation = layers.ACTIVATIONS[self.activation]
        block = layers.FeedForward(self.hidden, activation, dtype=self.dtype, name=name)
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
        prefix: tuple[KeysValues | None, ...] | None,
        kept: KeysValues | None,
    ) -> tuple[Array, tuple[tuple[KeysValues, ...], KeysValues | None] | None]:
        """As `Layer`; `prefix` and the returned cache hold one entry per layer of the group."""
        cache, images = [], []
        for number in range(self.length):
            layer = Layer(**self.fields, cross=number == 0, name=f"layer_{number}")
            one = None if prefix is None else prefix[number]
            x, keys, image = layer(x, mask, features, feature_mask, one, kept)
            cache.append(keys)
            images.append(image)
        return x, (tuple(cache), images[0]) if self.keep_cache else None


class QFormer(bert.Sizes):
    """Queries and text over image features.

    Attributes:
      cross_attention_frequency: layers 0, f, 2f ... attend to the image.
      vocabulary, positions: rows of the text tables; 0 = no text branch.
      The others as in `bert.Sizes`; `remat` is by groups.
    """

    cross_attention_frequency: int = 2
    vocabulary: int = 0
    positions: int = 0

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
        images: Cache | None = None,
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
          images: the same; then the batch holds three rows an image, see `shared_images`, and
            `features` `[batch / 3, patches, encoder width]` are those of the other images.
          causal: captioning, see `visible`.
          keep_cache: return the keys and values of self-attention, and under 'images' those of the
            features.
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
        own = {name: keys for name, keys in (cache or {}).items() if name != IMAGES}
        before = jax.tree.leaves(own)[0].shape[-3] if own else 0
        mask = visible(rows + before, text_mask, causal=causal, cached=cache is not None)
        images = None if images is None else images[IMAGES]
        if feature_mask is not None:
            feature_mask = feature_mask.astype(bool)[:, None, None, :]
        return self._groups(x, mask, features, feature_mask, own, images, rows, keep_cache, train)

    def _groups(
        self,
        x: Array,
        mask: Array | None,
        features: Array | None,
        feature_mask: Array | None,
        cache: Cache,
        images: Cache | None,
        rows: int,
        keep_cache: bool,
        train: bool,
    ) -> tuple[Array, Cache | None]:
        """The whole groups as one scan, then a shorter group where the depth leaves one."""
        names = ("heads", "hidden", "activation", "epsilon", "dropout")
        fields = {name: getattr(self, name) for name in names}
        fields |= {"queries": rows, "dtype": self.dtype, "train": train}
        count, rest = divmod(self.depth, self.cross_attention_frequency)
        images, kept = images or {}, {IMAGES: {}}
        for name, length, depth in (
            ("groups", self.cross_attention_frequency, count),
            ("tail", rest, min(rest, 1)),
        ):
            if not depth:
                continue
            stack = layers.stack(
                Group, depth, broadcast=3, scanned=2, remat=self.remat, unroll=self.unroll
            )
            group = stack(length, keep_cache, fields, name=name)
            x, made = group(x, mask, features, feature_mask, cache.get(name), images.get(name))
            if keep_cache:
                kept[name], kept[IMAGES][name] = made
        return x, kept if keep_cache else None


SIZES = {
    "bert_base": dict(width=768, depth=12, heads=12, hidden=3072),
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
