"""BLIP-2's first-stage losses (arXiv 2301.12597, section 3.2; X-LLM's `xllm_qformer.py`).

ITC aligns images and texts, ITM tells pairs from hard negatives, ITG writes the caption. The batch
is the global batch: under a sharded jit every rank sees all pairs, which gives the ITC and ITM of
the reference's gathered ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp

from xllm_jax.core.batch import ImageTextPairs
from xllm_jax.core.types import Metrics, Params
from xllm_jax.core.weighted_mean import WeightedMean, divisor
from xllm_jax.models.blip2_pretraining import ContrastModel
from xllm_jax.models.qformer import Cache, interleave
from xllm_jax.models.xllm import XLLM

Array = jax.Array
PASSES = ("image", "text", "match", "caption")  # methods of the network that use dropout

NORMALIZERS = ("pairs", "tokens")  # what the terms of the loss are means over
WHOLE_BATCH = True  # ITC and ITM compare within a micro-batch: another one is another loss
ABSENT = -1e9  # the score of a candidate that does not exist


def loss(
    model: XLLM,
    params: Params,
    batch: ImageTextPairs,
    key: Array | None = None,
    *,
    train: bool = False,
    modality: str = "image",
    **options: Any,
) -> tuple[Array, Metrics]:
    """The stage's loss: the frozen encoder, then `pair_loss`.

    Args:
      model: `models.xllm.XLLM` whose interface for `modality` is a `ContrastModel`.
      params: {part: parameters}.
      batch: the pairs.
      key: of dropout and negatives; needed with `train`.
      train: switches dropout on.
      modality: which modality of the model is aligned with text.
      options: of `pair_loss`.

    Returns:
      (scalar, metrics).
    """
    encoder, interface = model.parts(modality)
    features, _ = model.apply(params, encoder, batch.images, None)
    return pair_loss(
        cast(ContrastModel, model.networks[interface]),
        params[interface],
        features,
        batch.ids,
        batch.mask,
        key,
        weights=batch.weights,
        train=train,
        **options,
    )


def counts(batch: ImageTextPairs, metrics: Metrics) -> dict[str, Array]:
    """{metric: over how many pairs, or tokens of ITG, it is the mean}, scalars."""
    pairs, tokens = batch.weights.sum(), _tokens(batch.mask, batch.weights).sum()
    written = {"itg": tokens, "itg_accuracy": tokens}
    names = ("loss", "itc", "itm", "itc_accuracy", "itm_accuracy")
    return {name: pairs for name in names} | written


def _tokens(mask: Array, weights: Array) -> Array:
    """Which tokens ITG writes, `[B, T - 1]` bool: those behind the first, of rows with a pair."""
    return mask[:, 1:] & (weights > 0)[:, None]


def pair_loss(
    model: ContrastModel,
    params: Params,
    features: Array,
    ids: Array,
    mask: Array,
    key: Array | None = None,
    *,
    weights: Array | None = None,
    start: int | None = None,
    train: bool = False,
    negatives: tuple[Array, Array] | None = None,
    negative_rule: str = "xllm",
    smoothing: float = 0.1,
    detach: bool = True,
    shards: int = 1,
    shares: Mapping[str, float] | None = None,
) -> tuple[Array, Metrics]:
    """ITC + ITM + ITG of matching image-text pairs.

    Args:
      model, params: the stage-1 network and its parameters.
      features: `[B, patches, encoder width]` of the vision encoder.
      ids, mask: `[B, T]` texts and which tokens are real.
      key: of dropout and of the negatives; None only without both.
      weights: `[B]`, 0 = the row holds no pair and counts nowhere; None = all rows are pairs.
      start: id that begins a caption; None = the last of the vocabulary, BLIP-2's [DEC].
      train: switches dropout on.
      negatives: image indices and text indices `[B]` for ITM; None samples them.
      negative_rule: 'xllm' or 'lavis', see `negative_weights`.
      smoothing: label smoothing of ITC and ITG.
      detach: ITC sends no gradient to the features that a row is compared with, as the reference's
        gathering does; sim_i2t then trains the image side only, sim_t2i the text side only.
      shards: 1 = ITG is the mean over all tokens of the global batch; n = the mean over n equal
        shards of each shard's token mean, as n ranks of the reference compute it.

      shares: weights of 'itc', 'itm' and 'itg' in the sum; None = 1 each.

    Returns:
      (scalar, metrics: 'itc', 'itm', 'itg' losses, '<name>_accuracy' and 'terms' of `_sum`).
    """
    ids, mask = jnp.asarray(ids), jnp.asarray(mask)
    start = model.vocabulary - 1 if start is None else start
    weights = jnp.ones(ids.shape[0]) if weights is None else weights
    key = jax.random.key(0) if key is None else key
    keys = dict(zip((*PASSES, "negatives"), jax.random.split(key, len(PASSES) + 1)))
    run = functools.partial(_run, model, params, keys if train else None)
    image = cast(Array, model.apply({"params": params}, features, method="normalize"))
    _, image_units, cache = run("image", image)
    _, text_units = run("text", ids, mask)
    similar = similarities(image_units, text_units[:, 0], params["temperature"], detach)
    found = {"itc": contrastive(*similar, smoothing, weights)}
    if negatives is None:
        negatives = sample_negatives(keys["negatives"], *similar, negative_rule, weights)
    found["itm"] = matching(_match(run, image, ids, mask, cache, *negatives), weights)
    _, logits = run("caption", ids.at[:, 0].set(start), mask, cache)
    real = mask & (weights > 0)[:, None]
    found["itg"] = captioning(logits, ids, real, smoothing, shards)
    tokens = _tokens(mask, weights).sum() if shards == 1 else jnp.ones(())
    return _sum(found, shares or dict.fromkeys(found, 1.0), weights.sum(), tokens)


def _sum(
    found: Mapping[str, tuple[Array, Array]],
    shares: Mapping[str, float],
    pairs: Array,
    tokens: Array,
) -> tuple[Array, Metrics]:
    """The weighted sum of {name: (loss, accuracy)}, and all of them as metrics.

    Its terms (`core.weighted_mean`): ITC and ITM are means over pairs, ITG is one over tokens.

    Args:
      found: losses and accuracies.
      shares: weights of the losses.
      pairs: number of pairs.
      tokens: number of tokens that ITG writes; 1 where it is a mean over shards, so that every
        batch weighs the same.
    """
    metrics: Metrics = {name: loss for name, (loss, _) in found.items()}
    metrics |= {f"{name}_accuracy": accuracy for name, (_, accuracy) in found.items()}
    own = {name: shares[name] * metrics[name] for name in found}
    terms = {
        "pairs": WeightedMean((own["itc"] + own["itm"]) * pairs, pairs),
        "tokens": WeightedMean(own["itg"] * tokens, tokens),
    }
    return jnp.asarray(sum(own.values())), metrics | {"terms": terms}


def _run(
    model: ContrastModel,
    params: Params,
    keys: Mapping[Any, Array] | None,
    method: str,
    *inputs: Array,
) -> Any:
    """One pass of the network; `keys` {pass: dropout key} is None outside training."""
    rngs = {"dropout": keys[method]} if keys else None
    return model.apply(
        {"params": params}, *inputs, train=keys is not None, rngs=rngs, method=method
    )


def similarities(
    images: Array, texts: Array, temperature: Array, detach: bool = True
) -> tuple[Array, Array]:
    """Cosines of all pairs, each the best of an image's queries, over the temperature.

    Args:
      images: `[B, queries, embed]` unit vectors.
      texts: `[B, embed]` unit vectors.
      temperature: scalar, not clamped (the reference does not either).
      detach: see `pair_loss`.

    Returns:
      images by texts `[B, B]`, texts by images `[B, B]`, float32.
    """
    cut = jax.lax.stop_gradient if detach else lambda x: x
    to_text = jnp.einsum("bqe,ce->bcq", images, cut(texts)).max(-1)
    to_image = jnp.einsum("be,cqe->bcq", texts, cut(images)).max(-1)
    return to_text / temperature, to_image / temperature


def smoothed_cross_entropy(
    logits: Array, targets: Array, smoothing: float, real: Array | None = None
) -> Array:
    """Cross-entropy with a part of the target spread evenly over all classes.

    Args:
      logits: `[..., classes]`.
      targets: `[...]` int32.
      smoothing: the part that is spread.
      real: `[classes]` bool, classes that exist; None = all.

    Returns:
      `[...]` float32.
    """
    logits = logits.astype(jnp.float32)
    real = jnp.ones(logits.shape[-1], bool) if real is None else real
    scores = jax.nn.log_softmax(jnp.where(real, logits, ABSENT), axis=-1)
    chosen = jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]
    spread = jnp.where(real, scores, 0).sum(-1) / jnp.maximum(real.sum(), 1)
    return -(1 - smoothing) * chosen - smoothing * spread


def weighted_mean(values: Array, weights: Array) -> Array:
    """Mean of `[rows]` values over the rows that count; 0 when none does."""
    return (values * weights).sum() / divisor(weights.sum())


def contrastive(
    to_text: Array, to_image: Array, smoothing: float, weights: Array
) -> tuple[Array, Array]:
    """ITC: mean of both directions, and the share of rows whose own partner is the nearest.

    Args:
      to_text, to_image: `[B, B]` of `similarities`.
      smoothing: label smoothing.
      weights: `[B]`, 0 = the row holds no pair.
    """
    targets, real = jnp.arange(to_text.shape[0]), weights > 0
    losses, hits = [], []
    for similar in (to_text, to_image):
        rows = smoothed_cross_entropy(similar, targets, smoothing, real)
        losses.append(weighted_mean(rows, weights))
        nearest = jnp.where(real, similar, ABSENT).argmax(-1)
        hits.append(weighted_mean(nearest == targets, weights))
    return (losses[0] + losses[1]) / 2, (hits[0] + hits[1]) / 2


def negative_weights(similar: Array, rule: str, weights: Array | None = None) -> Array:
    """Weights `[B, B]` by which row b draws its negative; row b itself has weight 0.

    'xllm': softmax plus 1e-4, then the diagonal set to 0, so that every pair stays possible.
    'lavis': the diagonal set to -10000 before the softmax, nothing added.
    Rows whose entry of `weights` is 0 are never drawn.

    Args:
      similar: `[B, B]` scores of each row's candidates.
      rule: 'xllm' or 'lavis'.
      weights: `[B]`, 0 = the row holds no pair; None = all are pairs.
    """
    own = jnp.eye(similar.shape[0], dtype=bool)
    absent = False if weights is None else (weights == 0)[None]
    similar = jnp.where(absent, ABSENT, similar)
    if rule == "xllm":
        return jnp.where(own | absent, 0.0, jax.nn.softmax(similar, axis=-1) + 1e-4)
    if rule == "lavis":
        return jax.nn.softmax(jnp.where(own, -10000.0, similar), axis=-1)
    raise ValueError(f"unknown negative rule {rule!r}")


def sample_negatives(
    key: Array, to_text: Array, to_image: Array, rule: str, weights: Array | None = None
) -> tuple[Array, Array]:
    """A hard negative image for every text and a hard negative text for every image, `[B]` each.

    Args:
      key: random key.
      to_text, to_image: `[B, B]` of `similarities`.
      rule, weights: see `negative_weights`.
    """
    drawn = []
    for one, similar in zip(jax.random.split(key), (to_image, to_text)):
        chances = negative_weights(jax.lax.stop_gradient(similar), rule, weights)
        drawn.append(jax.random.categorical(one, jnp.log(chances)))
    return drawn[0], drawn[1]


def matching_rows(
    image: Array, ids: Array, mask: Array, images: Array, texts: Array
) -> tuple[Array, Array, Array]:
    """The 3B rows of ITM: pairs, texts with negative images, images with negative texts.

    Args:
      image: `[B, patches, width]`.
      ids, mask: `[B, T]`.
      images, texts: `[B]` int32, the negatives' rows.
    """
    image, ids, mask = (jnp.asarray(x) for x in (image, ids, mask))
    return (
        jnp.concatenate([image, image[images], image]),
        jnp.concatenate([ids, ids, ids[texts]]),
        jnp.concatenate([mask, mask, mask[texts]]),
    )


def _match(
    run: Callable[..., tuple[Array, Array]],
    image: Array,
    ids: Array,
    mask: Array,
    cache: Cache,
    images: Array,
    texts: Array,
) -> Array:
    """Logits `[3B, queries, 2]` of `matching_rows`, in its order.

    Rows of one image run side by side and share the keys and values of the image pass, since to
    compute them for every row was a tenth of the stage's work.
    """
    images, texts = jnp.asarray(images), jnp.asarray(texts)
    ids, mask = (interleave(x, x, x[texts]) for x in (ids, mask))
    _, logits = run("match", image[images], ids, mask, cache)
    logits = logits.reshape(-1, 3, *logits.shape[1:])
    return logits.swapaxes(0, 1).reshape(-1, *logits.shape[2:])


def matching(per_query: Array, weights: Array) -> tuple[Array, Array]:
    """ITM: cross-entropy of the mean over queries; `[3B, queries, 2]`, the first B rows match."""
    logits, weights = per_query.mean(1), jnp.tile(weights, 3)
    rows = logits.shape[0]
    labels = (jnp.arange(rows) < rows // 3).astype(jnp.int32)
    losses = smoothed_cross_entropy(logits, labels, 0.0)
    return weighted_mean(losses, weights), weighted_mean(logits.argmax(-1) == labels, weights)


def captioning(
    logits: Array, ids: Array, mask: Array, smoothing: float, shards: int = 1
) -> tuple[Array, Array]:
    """ITG: the next real token, from `[B, T, vocabulary]` logits; mean over real tokens.

    Args:
      logits: of every position.
      ids, mask: `[B, T]` texts and which tokens are real.
      smoothing: label smoothing.
      shards: see `pair_loss`.
    """
    weights = mask[:, 1:].astype(jnp.float32)
    losses = smoothed_cross_entropy(logits[:, :-1], ids[:, 1:], smoothing) * weights
    hits = (logits[:, :-1].argmax(-1) == ids[:, 1:]) * weights
    parts = [x.reshape(shards, -1).sum(1) for x in (losses, weights)]
    count = jnp.maximum(weights.sum(), 1)
    return (parts[0] / jnp.maximum(parts[1], 1)).mean(), hits.sum() / count
