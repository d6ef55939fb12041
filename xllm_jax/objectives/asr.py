"""Stage 1, speech: label-smoothed cross-entropy + quantity loss + CTC (paper, appendix A.2).

Weights 1.0 and 0.5 and the sums follow MingLunHan/CIF-HieraDist `criterions/cif.py`: every term is
summed over the batch and the total is divided by the number of target tokens, end token included.
On several devices that is the number of the global batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from xllm_jax.core import rules
from xllm_jax.core.batch import TranscriptionBatch
from xllm_jax.core.types import Metrics, Params
from xllm_jax.core.weighted_mean import WeightedMean, divisor
from xllm_jax.models.asr import previous_tokens
from xllm_jax.models.cif import Fired
from xllm_jax.models.xllm import XLLM

Array = jax.Array

IMPOSSIBLE = -1e30  # log of a probability zero; finite, so that its gradient is no NaN
BLANK = 0
NORMALIZERS = ("tokens",)  # what the terms of the loss are means over


def smoothed_cross_entropy(
    logits: Array, targets: Array, smoothing: float = 0.1
) -> tuple[Array, Array]:
    """Cross-entropy with `smoothing` spread over the other tokens.

    Args:
      logits: `[..., vocab]`.
      targets: `[...]` int32.
      smoothing: probability that the target gives away.

    Returns:
      (smoothed loss, plain negative log likelihood), each `[...]` float32.
    """
    logs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    plain = -jnp.take_along_axis(logs, targets[..., None], axis=-1)[..., 0]
    share = smoothing / (logits.shape[-1] - 1)
    return (1.0 - smoothing - share) * plain - share * logs.sum(-1), plain


def ctc_losses(logits: Array, lengths: Array, targets: Array, target_lengths: Array) -> Array:
    """Connectionist temporal classification, vectorized over batch and labels.

    Args:
      logits: `[batch, frames, vocab]`.
      lengths: `[batch]` valid frames.
      targets: `[batch, labels]` int32, without blanks.
      target_lengths: `[batch]` valid labels.

    Returns:
      `[batch]` float32 negative log likelihood; infinite (with zero gradient) where the frames
      cannot hold the labels.
    """
    logs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    blank = logs[..., BLANK]
    label = jnp.take_along_axis(logs, targets[:, None], axis=-1)
    # States alternate blank, label, blank ... ; blanks and labels are two arrays of their own.
    skips = jnp.pad(targets[:, 1:] != targets[:, :-1], ((0, 0), (1, 0)))
    batch, labels = targets.shape
    at_blank = jnp.full((batch, labels + 1), IMPOSSIBLE).at[:, 0].set(0.0)
    at_label = jnp.full((batch, labels), IMPOSSIBLE)

    def advance(state: tuple[Array, Array], frame: tuple[Array, ...]) -> tuple[tuple, None]:
        at_blank, at_label = state
        blank, label, runs = frame
        before = jnp.pad(at_label, ((0, 0), (1, 0)), constant_values=IMPOSSIBLE)
        skipped = jnp.where(skips, before[:, :-1], IMPOSSIBLE)
        next_label = log_sum(at_label, at_blank[:, :-1], skipped) + label
        next_blank = jnp.logaddexp(at_blank, before) + blank[:, None]
        keep = runs[:, None]
        return (
            jnp.where(keep, next_blank, at_blank),
            jnp.where(keep, next_label, at_label),
        ), None

    runs = jnp.arange(logits.shape[1])[:, None] < lengths
    frames = (blank.T, label.swapaxes(0, 1), runs)
    (at_blank, at_label), _ = jax.lax.scan(advance, (at_blank, at_label), frames)
    end = target_lengths[:, None]
    last_blank = jnp.take_along_axis(at_blank, end, axis=1)[:, 0]
    last_label = jnp.take_along_axis(at_label, jnp.maximum(end - 1, 0), axis=1)[:, 0]
    last_label = jnp.where(target_lengths > 0, last_label, IMPOSSIBLE)
    total = jnp.logaddexp(last_blank, last_label)
    return jnp.where(total > IMPOSSIBLE / 2, -total, jnp.inf)


def log_sum(first: Array, second: Array, third: Array) -> Array:
    """log(exp(first) + exp(second) + exp(third)), elementwise, for finite values.

    Args:
      first, second, third: arrays of one shape.
    """
    top = jax.lax.stop_gradient(jnp.maximum(jnp.maximum(first, second), third))
    return top + jnp.log(jnp.exp(first - top) + jnp.exp(second - top) + jnp.exp(third - top))


class Terms(NamedTuple):
    """Sums over the batch: scalars float32.

    Attributes:
      smoothed, plain: cross-entropy with and without smoothing.
      ctc: CTC loss; impossible: number of utterances too short for their text.
      quantity: distance of predicted and true token counts.
      hits, supervised: tokens predicted right, tokens with a CIF embedding.
      count: target tokens, the divisor.
    """

    smoothed: Array
    plain: Array
    ctc: Array
    impossible: Array
    quantity: Array
    hits: Array
    supervised: Array
    count: Array


def terms(
    logits: Array,
    ctc_logits: Array,
    lengths: Array,
    quantity: Array,
    targets: Array,
    target_lengths: Array,
    label_smoothing: float = 0.1,
    zero_infinity: bool = True,
) -> Terms:
    """All terms of the loss.

    Args:
      logits: `[batch, tokens, vocab]`, as many tokens as CIF embeddings or fewer.
      ctc_logits: `[batch, frames, vocab]`; `lengths` `[batch]` valid frames.
      quantity: `[batch]` predicted token counts.
      targets: `[batch, labels]` int32; labels beyond the logits are not supervised.
      target_lengths: `[batch]`; 0 leaves a row out of every term.
      label_smoothing: see `smoothed_cross_entropy`.
      zero_infinity: leave CTC out where an utterance is too short for its text (the reference
        lets the loss become infinite).
    """
    width = min(logits.shape[1], targets.shape[1])
    logits, chosen = logits[:, :width], targets[:, :width]
    valid = jnp.arange(width) < target_lengths[:, None]
    smoothed, plain = smoothed_cross_entropy(logits, chosen, label_smoothing)
    ctc = ctc_losses(ctc_logits, lengths, targets, target_lengths)
    used = target_lengths > 0
    impossible = used & jnp.isinf(ctc)
    if zero_infinity:
        used &= ~impossible
    wanted = target_lengths.astype(jnp.float32)
    return Terms(
        smoothed=jnp.where(valid, smoothed, 0.0).sum(),
        plain=jnp.where(valid, plain, 0.0).sum(),
        ctc=jnp.where(used, ctc, 0.0).sum(),
        impossible=impossible.sum().astype(jnp.float32),
        quantity=jnp.where(wanted > 0, jnp.abs(quantity - wanted), 0.0).sum(),
        hits=(valid & (logits.argmax(-1) == chosen)).sum().astype(jnp.float32),
        supervised=valid.sum().astype(jnp.float32),
        count=wanted.sum(),
    )


def combine(
    parts: Terms,
    quantity_weight: float = 1.0,
    ctc_weight: float = 0.5,
    quantity_scale: Array | float = 1.0,
) -> Array:
    """The summed loss; divide it by `parts.count`.

    `quantity_scale` is the mean target length in the reference's `boost_qtt_loss`.

    Args:
      parts: sums over the batch.
      quantity_weight, ctc_weight: of these losses in the sum.
      quantity_scale: factor on the quantity loss.
    """
    quantity = quantity_weight * quantity_scale * parts.quantity
    return parts.smoothed + quantity + ctc_weight * parts.ctc


class Outputs(NamedTuple):
    """What the ASR model computes with teacher forcing.

    Attributes:
      fired: CIF output.
      features: `[batch, frames, width]` of the encoder; `lengths` `[batch]` valid frames.
      logits: `[batch, tokens, vocab]`; ctc_logits: `[batch, frames, vocab]`.
      statistics: next BatchNorm statistics by part.
    """

    fired: Fired
    features: Array
    lengths: Array
    logits: Array
    ctc_logits: Array
    statistics: Params


def forward(
    model: XLLM,
    params: Params,
    batch: TranscriptionBatch,
    train: bool = False,
    key: Array | None = None,
) -> Outputs:
    """The stage-1 ASR model with teacher forcing.

    Args:
      model: has `networks` `{'speech_encoder', 'speech_interface', 'asr_decoder'}`.
      params: {part: parameters}.
      batch: utterances and their characters.
      train, key: dropout and its key.
    """
    keys = [None] * 3 if key is None else list(jax.random.split(key, 3))
    rngs = [None if k is None else {"dropout": k} for k in keys]
    features, lengths, statistics = model.apply(
        params,
        "speech_encoder",
        batch.features,
        batch.lengths,
        train=train,
        statistics=True,
        rngs=rngs[0],
    )
    fired = model.apply(
        params,
        "speech_interface",
        features,
        lengths,
        batch.token_lengths,
        train=train,
        rngs=rngs[1],
        method="fire",
    )
    width = min(fired.embeddings.shape[1], batch.tokens.shape[1])
    logits, ctc_logits = model.apply(
        params,
        "asr_decoder",
        previous_tokens(batch.tokens)[:, :width],
        fired.embeddings[:, :width],
        features,
        train=train,
        rngs=rngs[2],
    )
    statistics = {"speech_encoder": statistics}
    return Outputs(fired, features, lengths, logits, ctc_logits, statistics)


def counts(batch: TranscriptionBatch, metrics: Mapping[str, Array]) -> dict[str, Array]:
    """{metric: over how many target tokens it is the mean}, scalars.

    Args:
      batch: see `forward`.
      metrics: of `loss`.
    """
    every: dict[str, Array] = dict.fromkeys(("loss", "ctc", "quantity"), metrics["count"])
    return every | dict.fromkeys(("cross_entropy", "accuracy"), metrics["supervised"])


def loss(
    model: XLLM,
    params: Params,
    batch: TranscriptionBatch,
    key: Array | None = None,
    *,
    train: bool = False,
    label_smoothing: float = 0.1,
    quantity_weight: float = 1.0,
    ctc_weight: float = 0.5,
) -> tuple[Array, Metrics]:
    """The objective of stage 1, speech.

    Args:
      model, params, batch, key, train: see `forward`.
      label_smoothing, quantity_weight, ctc_weight: the recipe's 0.1, 1.0 and 0.5.

    Returns:
      (scalar float32 per target token, metrics). `metrics['assign']`, in training, holds the next
      BatchNorm statistics by parameter path; those leaves belong to the trainable half, so that
      checkpoints keep them, and have no gradient. 'supervised' is the number of target tokens with
      an embedding; `terms` see `core.weighted_mean`.
    """
    outputs = forward(model, params, batch, train, key)
    parts = terms(
        outputs.logits,
        outputs.ctc_logits,
        outputs.lengths,
        outputs.fired.quantity,
        batch.tokens,
        batch.token_lengths,
        label_smoothing,
    )
    count, supervised = divisor(parts.count), divisor(parts.supervised)
    term = WeightedMean(combine(parts, quantity_weight, ctc_weight), parts.count)
    value = term.total / count
    metrics = {
        "loss": value,
        "cross_entropy": parts.plain / supervised,
        "ctc": parts.ctc / count,
        "quantity": parts.quantity / count,
        "accuracy": parts.hits / supervised,
        "impossible": parts.impossible,
        "count": parts.count,
        "supervised": parts.supervised,
        "terms": {"tokens": term},
    }
    return value, metrics | ({"assign": rules.flatten(outputs.statistics)} if train else {})
