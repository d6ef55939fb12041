"""Decoding-side alignment: what the LLM's states say of a picture comes near to what its caption
says (NExT-GPT, arXiv 2309.05519, section 3.2).

Cross-entropy on the answer and its signal tokens, and for every run of these the mean distance of
its projection to what a frozen text encoder makes of the caption. Optionally also what the
projection is worth to a frozen diffusion network that sees the picture under noise (`denoising`),
as the project's second version adds it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp

from xllm_jax.core import damage, lookup, mesh
from xllm_jax.core.batch import ConversationBatch, SignalRuns
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Stage
from xllm_jax.core.types import Metrics, Params
from xllm_jax.core.weighted_mean import WeightedMean
from xllm_jax.models.outputs import scheduler_config, schedulers
from xllm_jax.models.outputs.autoencoder import Autoencoder
from xllm_jax.models.outputs.schedulers import Scheduler
from xllm_jax.models.xllm import XLLM
from xllm_jax.objectives import answer
from xllm_jax.objectives import denoising as diffusion

Array = jax.Array
PICTURES = "pictures"  # term of the denoising loss
SCHEDULE_FILE = "scheduler/scheduler_config.json"  # below a decoder's base
NOISE = 2**31 - 1  # the random stream of the denoising loss, apart from those of dropout


def normalizers(options: Mapping[str, Any]) -> tuple[str, ...]:
    """What the terms of the loss are means over; in alphabetical order, as the terms."""
    return (*((PICTURES,) if options.get("denoising") else ()), "runs", "tokens")


def prepared(stage: Stage) -> dict[str, Any]:
    """Noise schedules of the denoising loss, where the stage has one: `loss`'s `schedules`.

    Raises:
      UserError: no output has the networks, the pictures or the schedule that it needs.
    """
    if not stage.options.get("denoising"):
        return {}
    found = {}
    for name, out in stage.outputs.items():
        if not out.unet:
            continue
        if not stage.data.signals[name].pixels:
            what, hint = "reads no pictures, and the denoising loss asks for them", "Such as 512"
            raise UserError(what, field=f"data.signals.{name}.pixels", hint=hint)
        found[name] = _schedule(out.schedule, out.decoder, f"outputs.{name}.schedule")
    if not found:
        hint = "Name the parts of a UNet and an autoencoder, see configs/stage_output_denoising.py"
        raise UserError("needs a UNet in outputs", field="options.denoising", hint=hint)
    return {"schedules": found}


def _schedule(name: str, decoder: str, field: str) -> Scheduler:
    if name:
        return Scheduler(**lookup.size_row(schedulers.SIZES, name, field))
    file = Path(decoder) / SCHEDULE_FILE
    if not file.exists():
        what = f"names none, and there is no {file}"
        raise UserError(what, field=field, hint=f"Choices: {', '.join(schedulers.SIZES)}")
    return scheduler_config.parse(damage.read_object(file), "ddim", str(file))


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
    """`[B, R * n]` int32, positions of all runs; a run has n of them, `count`."""
    return (runs.start[..., None] + jnp.arange(count)).reshape(runs.start.shape[0], -1)


def wanted(model: XLLM, params: Params, modality: str, runs: SignalRuns) -> Array:
    """What the frozen text encoder makes of the captions, `[B, R, q, width]`; no gradient.

    Read from the batch where a cache holds it.
    """
    if runs.targets is not None:
        return jnp.asarray(runs.targets)
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
    denoising: float = 0.0,
    gamma: float = 5.0,
    schedules: Mapping[str, Scheduler] | None = None,
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
      denoising: factor of the denoising loss; 0 leaves it out.
      gamma: of its Min-SNR weights; 0 weighs all times the same.
      schedules: of `prepared`.

    Returns:
      (scalar float32; metrics of `answer.answer_loss`, with the terms `tokens` and `runs`, and for
      every modality a `WeightedMean` `distance/NAME` over its runs, not scaled; with a denoising
      loss the term `pictures` and `noise_error/NAME`, not scaled nor weighed).
    """
    at = {name: places(runs, model.spans[name]) for name, runs in sorted(batch.signals.items())}
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
    conditions = {n: model.project(params, n, x, model.spans[n]) for n, x in found.items()}
    factors = {name: (scales or {}).get(name, scale) for name in found}
    term, apart = apart_from_captions(model, params, batch, conditions, factors)
    metrics |= apart
    metrics["terms"] = {"runs": term, **metrics["terms"]}
    value += term.mean
    if denoising:
        term, errors = denoised(model, params, batch, conditions, schedules or {}, gamma, key)
        term = WeightedMean(denoising * term.total, term.count)
        metrics |= errors | {"terms": {PICTURES: term, **metrics["terms"]}}
        value += term.mean
    return value, metrics | {"loss": value}


def apart_from_captions(
    model: XLLM,
    params: Params,
    batch: ConversationBatch,
    conditions: Mapping[str, Array],
    factors: Mapping[str, float],
) -> tuple[WeightedMean, Metrics]:
    """How far projections are from what text encoders make of the captions.

    Args:
      model, params, batch: as of `loss`.
      conditions: {modality: `[B, R, q, width]`}, of `XLLM.project`.
      factors: {modality: factor of its distances}.

    Returns:
      (scaled distances over all runs, {`distance/NAME`: those of a modality, not scaled}).
    """
    total, number, metrics = jnp.float32(0), jnp.float32(0), {}
    for name, made in conditions.items():
        runs = batch.signals[name]
        far = distances(made, wanted(model, params, name, runs)).mean(-1)
        term = WeightedMean((far * runs.weights).sum(), runs.weights.sum())
        metrics[f"distance/{name}"] = term
        total += factors[name] * term.total
        number += term.count
    return WeightedMean(total, number), metrics


def denoised(
    model: XLLM,
    params: Params,
    batch: ConversationBatch,
    conditions: Mapping[str, Array],
    schedules: Mapping[str, Scheduler],
    gamma: float,
    key: Array | None = None,
) -> tuple[WeightedMean, Metrics]:
    """What projections are worth to the frozen networks that see the pictures under noise.

    Args:
      model: with `denoisers`.
      params: {part: parameters}.
      batch: whose `signals` hold pictures.
      conditions: {modality: `[B, R, q, width]`}, of `XLLM.project`.
      schedules: {modality: its noise schedule}.
      gamma: of the Min-SNR weights.
      key: of times and noise, see `denoising.draws`.

    Returns:
      (weighed errors over all pictures, {`noise_error/NAME`: errors without weights}).
    """
    total, number, metrics = jnp.float32(0), jnp.float32(0), {}
    for place, (name, schedule) in enumerate(sorted(schedules.items())):
        runs, (unet, autoencoder) = batch.signals[name], model.denoisers[name]
        assert runs.pictures is not None and runs.shown is not None, "`prepared` asks for them"
        # Numbers from -1 to 1, as `media.image.to_signed` makes them.
        pictures = _merged(runs.pictures).astype(jnp.float32) / 127.5 - 1
        mean, logvar = model.apply(params, autoencoder, pictures, method="encode")
        scaling = cast(Autoencoder, model.networks[autoencoder]).scaling
        own = None if key is None else jax.random.fold_in(key, NOISE - place)
        drawn = diffusion.draws(schedule, mean, logvar, scaling, own)

        def network(x: Array, time: Array, text: Array, part: str = unet) -> Array:
            return model.apply(params, part, x, time, text)

        text = _merged(conditions[name])
        weighed, errors = diffusion.each(
            network, schedule, drawn.latents, drawn.noise, drawn.times, text, gamma
        )
        shown = runs.shown.reshape(-1)
        metrics[f"noise_error/{name}"] = WeightedMean((errors * shown).sum(), shown.sum())
        total += (weighed * shown).sum()
        number += shown.sum()
    return WeightedMean(total, number), metrics


def _merged(x: Array) -> Array:
    """`[B, R, ...]` to `[B * R, ...]`."""
    return mesh.constrain_rows(jnp.asarray(x).reshape(-1, *x.shape[2:]))
