"""Text pre-training of the Q-Former's BERT: hidden pieces and text behind text.

BERT's masked language modeling (arXiv 1810.04805) plus UniLM's sequence to sequence form (arXiv
1905.03197): the second text is written behind the first with the very mask under which ITG later
writes a caption behind the queries. It makes the miniature's BERT; the real size starts from a
published one.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import cast

import jax
import jax.numpy as jnp

from xllm_jax.core.batch import TextPairs
from xllm_jax.core.types import Metrics, Params
from xllm_jax.core.weighted_mean import WeightedMean, divisor
from xllm_jax.models.blip2_pretraining import ContrastModel
from xllm_jax.models.xllm import XLLM
from xllm_jax.objectives.answer import cross_entropy

Array = jax.Array
NORMALIZERS = ("hidden", "written")  # what the terms of the loss are means over


def counts(batch: TextPairs, metrics: Mapping[str, Array]) -> dict[str, Array]:
    """{metric: over how many pieces, or rows for the sum of both, it is the mean}, scalars."""
    hidden, written = batch.hidden.sum(), batch.second_mask[:, 1:].sum()
    return {
        "loss": batch.first_mask.any(1).sum(),
        **dict.fromkeys(("masked", "masked_accuracy"), hidden),
        **dict.fromkeys(("written", "written_accuracy"), written),
    }


def loss(
    model: XLLM,
    params: Params,
    batch: TextPairs,
    key: Array | None = None,
    *,
    train: bool = False,
    part: str = "text_model",
) -> tuple[Array, Metrics]:
    """Mean loss of hidden pieces plus mean loss of the second texts' pieces.

    Args:
      model: `models.xllm.XLLM` whose part `part` is a `ContrastModel`.
      params: {part: parameters}.
      batch: of `data/batching/text_pairs.py`.
      key, train: dropout's key, and whether there is dropout.
      part: name of the network.

    Returns:
      (scalar, metrics `masked`, `written` (losses), `masked_accuracy`, `written_accuracy`, and
      `terms`, see `core.weighted_mean`).
    """
    keys = (None, None) if key is None or not train else jax.random.split(key)
    apply = functools.partial(model.apply, params, part)
    logits = apply(batch.joined, batch.joined_mask, train, method=_masked, rngs=_dropout(keys[0]))
    masked, masked_accuracy = _mean(logits, batch.targets, batch.hidden)
    ids = (
        jnp.asarray(batch.second)
        .at[:, 0]
        .set(cast(ContrastModel, model.networks[part]).vocabulary - 1)
    )
    logits = apply(
        *(batch.first, batch.first_mask, ids, batch.second_mask, train),
        method=_written,
        rngs=_dropout(keys[1]),
    )
    weights = batch.second_mask[:, 1:].astype(jnp.float32)
    written, written_accuracy = _mean(logits[:, :-1], ids[:, 1:], weights)
    metrics: Metrics = {"masked": masked.mean, "masked_accuracy": masked_accuracy}
    metrics |= {"written": written.mean, "written_accuracy": written_accuracy}
    metrics["terms"] = {"hidden": masked, "written": written}
    return masked.mean + written.mean, metrics


def _masked(network: ContrastModel, ids: Array, mask: Array, train: bool) -> Array:
    states, _ = network.text(ids, mask, train)
    return network.scores(states)


def _written(
    network: ContrastModel, first: Array, first_mask: Array, ids: Array, mask: Array, train: bool
) -> Array:
    _, cache = network.qformer(ids=first, text_mask=first_mask, keep_cache=True, train=train)
    return network.caption(ids, mask, cache or {}, train)[1]


def _mean(logits: Array, targets: Array, weights: Array) -> tuple[WeightedMean, Array]:
    count = jnp.asarray(weights).sum()
    hits = (logits.argmax(-1) == targets) * weights
    loss = WeightedMean((cross_entropy(logits, targets) * weights).sum(), count)
    return loss, hits.sum() / divisor(count)


def _dropout(key: Array | None) -> dict[str, Array] | None:
    return None if key is None else {"dropout": key}
