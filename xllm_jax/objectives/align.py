"""Decoding-side alignment: what the LLM's states say of a picture comes near to what its caption
says (NExT-GPT, arXiv 2309.05519, section 3.2).

Cross-entropy on the answer and its signal tokens, and for every run of these the mean distance of
its projection to what a frozen text encoder makes of the caption.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from xllm_jax.core.batch import ConversationBatch, SignalRuns
from xllm_jax.core.types import Metrics, Params
from xllm_jax.core.weighted_mean import WeightedMean
from xllm_jax.models.xllm import SIGNALS, XLLM
from xllm_jax.objectives import answer

Array = jax.Array
NORMALIZERS = ("runs", "tokens")  # what the terms of the loss are means over


def distances(made: Array, wanted: Array) -> Array:
    """Euclidean distances over the last axis, in float32; the gradient is 0 where they are 0.

    Args:
      made, wanted: `[..., width]`.

    Returns:
      `[...]`.
    """
    squares = jnp.square(made.astype(jnp.float32) - wanted.astype(jnp.float32)).sum(-1)
    apart = squares > 0
    return jnp.where(apart, jnp.sqrt(jnp.where(apart, squares, 1.0)), 0.0)


def places(runs: SignalRuns, count: int) -> Array:
    """`[B, R * n]` int32, positions of the tokens of all runs; n is `count`."""
    return (runs.start[..., None] + jnp.arange(count)).reshape(runs.start.shape[0], -1)


def wanted(model: XLLM, params: Params, modality: str, runs: SignalRuns) -> Array:
    """What the frozen text encoder makes of the captions, `[B, R, q, width]`; no gradient."""
    rows, most, length = runs.captions.shape
    captions = runs.captions.reshape(rows * most, length)
    made = model.apply(params, model.output(modality)[1], captions, method="states")
    return jax.lax.stop_gradient(made.reshape(rows, most, *made.shape[1:]))


def counts(batch: ConversationBatch, metrics: Metrics) -> dict[str, Array]:
    """{metric: over how many tokens it is the mean}, scalars; `WeightedMean` know theirs."""
    return answer.counts(batch, metrics)


def loss(
    model: XLLM,
    params: Params,
    batch: ConversationBatch,
    key: Array | None = None,
    *,
    train: bool = False,
    chunk: int = 64,
    scale: float = 1.0,
    scales: Mapping[str, float] | None = None,
) -> tuple[Array, Metrics]:
    """Cross-entropy plus the scaled distance, each a mean over the whole (global) batch.

    Args:
      model: with outputs.
      params: {part: parameters}.
      batch: with `signals`, any number of runs to a row.
      key, train: dropout's key, and whether there is dropout.
      chunk: logit vectors per row that exist at once.
      scale: factor of the distance.
      scales: {modality: its factor instead}.

    Returns:
      (scalar float32; metrics of `answer.answer_loss`, with the terms `tokens` and `runs`, and for
      every modality a `WeightedMean` `distance/NAME` over its runs, not scaled).
    """
    lengths = {name: count for name, _, count in model.networks[SIGNALS].registry}
    at = {name: places(runs, lengths[name]) for name, runs in sorted(batch.signals.items())}
    states, found = model.read(params, batch, at, train, key)
    value, metrics = answer.answer_loss(
        lambda x: model.logits(params, x),
        states,
        batch.answer_index,
        batch.targets,
        batch.weights,
        chunk,
        answer.carriers(batch),
    )
    total, number = jnp.float32(0), jnp.float32(0)
    for name, readings in found.items():
        runs = batch.signals[name]
        made = model.project(params, name, readings, lengths[name])
        far = distances(made, wanted(model, params, name, runs)).mean(-1)
        term = WeightedMean((far * runs.weights).sum(), runs.weights.sum())
        metrics[f"distance/{name}"] = term
        total += (scales or {}).get(name, scale) * term.total
        number += term.count
    term = WeightedMean(total, number)
    metrics["terms"] = {"runs": term, **metrics["terms"]}
    value += term.mean
    return value, metrics | {"loss": value}
