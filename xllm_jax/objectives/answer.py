"""Loss on the answer only (stages 2 and 3; paper section 3.3).

Logits exist at supervised positions alone: prompt positions never meet the 130k-row head. They are
computed a few positions at a time and once more in the backward pass, so that memory is bounded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from xllm_jax.core import mesh
from xllm_jax.core.batch import ConversationBatch
from xllm_jax.core.types import Metrics, Params
from xllm_jax.core.weighted_mean import WeightedMean, divisor
from xllm_jax.models.xllm import XLLM

Array = jax.Array
NORMALIZERS = ("tokens",)  # what the terms of the loss are means over


def cross_entropy(logits: Array, targets: Array) -> Array:
    """Negative log likelihood in float32: `[..., V]` logits, `[...]` int32 targets to `[...]`."""
    logits = logits.astype(jnp.float32)
    return jax.nn.logsumexp(logits, axis=-1) - target_scores(logits, targets)


def target_scores(logits: Array, targets: Array) -> Array:
    """The targets' own entries of `[..., V]`, by a sum: a device may hold a part of V only."""
    own = jnp.arange(logits.shape[-1]) == targets[..., None]
    return jnp.where(own, logits, 0).sum(-1)


def token_losses(
    logits: Callable[[Array], Array], states: Array, targets: Array, chunk: int = 64
) -> tuple[Array, Array]:
    """Losses and hits of single tokens, with at most `chunk` logit vectors per row at a time.

    Args:
      logits: `[B, c, D]` states to `[B, c, V]`.
      states: `[B, A, D]` states that predict the targets.
      targets: `[B, A]` int32.
      chunk: c.

    Returns:
      (negative log likelihood `[B, A]` float32, whether the target is the best token `[B, A]`
      float32).
    """

    @jax.checkpoint
    def part(states: Array, targets: Array) -> tuple[Array, Array]:
        scores = logits(states)
        # As argmax says but for exact ties; argmax would move all scores between devices.
        hits = target_scores(scores, targets) >= scores.max(-1)
        return cross_entropy(scores, targets), hits.astype(jnp.float32)

    length = targets.shape[1]
    if length <= chunk:
        return part(states, targets)
    count = -(-length // chunk)
    pad = count * chunk - length

    def pieces(x: Array) -> Array:  # [B, A, ...] to [count, B, chunk, ...]; rows stay together
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(x.shape[0], count, chunk, *x.shape[2:]).swapaxes(0, 1)

    losses, hits = jax.lax.map(lambda piece: part(*piece), (pieces(states), pieces(targets)))
    rows = targets.shape[0]
    losses, hits = (x.swapaxes(0, 1).reshape(rows, -1)[:, :length] for x in (losses, hits))
    return losses, hits


def answer_loss(
    logits: Callable[[Array], Array],
    states: Array,
    answer_index: Array,
    targets: Array,
    weights: Array,
    chunk: int = 64,
    kinds: Mapping[str, Array] | None = None,
) -> tuple[Array, Metrics]:
    """Weighted mean over the supervised tokens of the whole (global) batch.

    Args:
      logits: see `token_losses`.
      states: `[B, T, D]` final states of the LLM.
      answer_index, targets: `[B, A]` int32; the state at `answer_index` predicts the target.
      weights: `[B, A]` float32, 0 = padding.
      kinds: {name: `[B, A]` bool}, tokens whose loss is also reported apart.

    Returns:
      (scalar float32; metrics `loss`, `accuracy` of tokens, `count`, the sum of weights, `terms`,
      see `core.weighted_mean`, and a `WeightedMean` `loss/NAME` for every kind).
    """
    states = mesh.constrain_rows(jnp.take_along_axis(states, answer_index[..., None], axis=1))
    losses, hits = token_losses(logits, states, targets, chunk)
    count = weights.sum()
    term = WeightedMean((losses * weights).sum(), count)
    loss = term.total / divisor(count)
    metrics: Metrics = {
        "loss": loss,
        "accuracy": (hits * weights).sum() / divisor(count),
        "count": count,
        "terms": {"tokens": term},
    }
    for name, kind in (kinds or {}).items():
        own = weights * kind
        metrics[f"loss/{name}"] = WeightedMean((losses * own).sum(), own.sum())
    return loss, metrics


def carriers(batch: ConversationBatch) -> dict[str, Array]:
    """Which supervised tokens belong to examples that carry a modality: {name: `[B, A]` bool}.

    An example with several media counts in each; 'text' are the examples without any. Nothing
    where the batch can hold no media.
    """
    if not batch.media:
        return {}
    own = jnp.take_along_axis(jnp.asarray(batch.segments), batch.answer_index, axis=1)
    same = own[:, :, None] == batch.segments[:, None, :]
    found = {
        name: (same & (media.index >= 0)[:, None]).any(-1)
        for name, media in sorted(batch.media.items())
    }
    return found | {"text": ~jnp.stack(list(found.values())).any(0)}


def counts(batch: ConversationBatch, metrics: Metrics) -> dict[str, Array]:
    """{metric: over how many tokens it is the mean}, scalars; `WeightedMean` know theirs."""
    return dict.fromkeys(("loss", "accuracy"), batch.weights.sum())


def loss(
    model: XLLM,
    params: Params,
    batch: ConversationBatch,
    key: Array | None = None,
    *,
    train: bool = False,
    chunk: int = 64,
    perplexity: bool = False,
) -> tuple[Array, Metrics]:
    """The objective of stages 2 and 3; also reports the loss of each modality's examples.

    Args:
      model: `models.xllm.XLLM`.
      params: {part: parameters}.
      batch: see `core.batch`.
      key, train: dropout's key, and whether there is dropout.
      chunk: logit vectors per row that exist at once.
      perplexity: the metrics also hold `perplexity`, of a batch; it is no mean.

    Returns:
      (scalar float32, metrics) of `answer_loss`.
    """
    states = model.hidden(params, batch, train=train, key=key)
    value, metrics = answer_loss(
        lambda x: model.logits(params, x),
        states,
        batch.answer_index,
        batch.targets,
        batch.weights,
        chunk,
        carriers(batch),
    )
    return value, metrics | ({"perplexity": jnp.exp(value)} if perplexity else {})
