"""Denoising latents of pictures beside their words (arXiv 2006.11239; 2112.10752, equation 3).

Pre-trains the mini diffusion model: UNet and text encoder learn together, the autoencoder is done,
and its latents may have been computed before (`data/batching/scene_latents.py`).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import cast

import jax
import jax.numpy as jnp

from xllm_jax.core.batch import DescribedLatents, DescribedPictures
from xllm_jax.core.errors import UserError
from xllm_jax.core.types import Metrics, Params
from xllm_jax.models.outputs import schedulers
from xllm_jax.models.outputs.autoencoder import Autoencoder
from xllm_jax.models.xllm import XLLM
from xllm_jax.objectives import denoising

Array = jax.Array
# The noise schedule of Stable Diffusion.
SCHEDULE = schedulers.Ddim(**schedulers.SIZES["stable_diffusion_1_5"])
PREDICTIONS = (schedulers.EPSILON, schedulers.VELOCITY)
QUARTERS = 4


def loss(
    model: XLLM,
    params: Params,
    batch: DescribedPictures | DescribedLatents,
    key: Array | None = None,
    *,
    train: bool = False,
    gamma: float = 0.0,
    prediction: str = schedulers.EPSILON,
    late: float = 1.0,
) -> tuple[Array, Metrics]:
    """Mean squared error of what is predicted, at one random time for every picture.

    Args:
      model: `models.xllm.XLLM` with the parts 'text_encoder' and 'unet', for
        pictures with 'vae', too.
      params: {part: parameters}.
      batch: pictures or their latents, and their words.
      key: of times and noise; without one, times are spread evenly and the noise is always one.
      train: is not asked for here.
      gamma: of Min-SNR weights (arXiv 2303.09556); 0 weighs all times the same.
      prediction: what the UNet learns to say, one of PREDICTIONS.
      late: how much more often noisy times are drawn, see `denoising.draws`; at least 1.

    Returns:
      (scalar, metrics `noise_error/q`: the error without weights in each quarter of the schedule).

    Raises:
      UserError: an unknown prediction, or `late` below 1.
    """
    if prediction not in PREDICTIONS:
        hint = f"Known: {', '.join(PREDICTIONS)}"
        raise UserError(f"unknown prediction {prediction!r}", field="options", hint=hint)
    if not late >= 1:
        raise UserError(f"late={late} is below 1", field="options", hint="1 draws all times alike")
    schedule = dataclasses.replace(SCHEDULE, prediction=prediction)
    mean, logvar, scaling = _posterior(model, params, batch)
    latents, noise, time = denoising.draws(schedule, mean, logvar, scaling, key, late)
    text = model.apply(params, "text_encoder", batch.ids, method="states")
    network = functools.partial(model.apply, params, "unet")
    value, errors = denoising.loss(network, schedule, latents, noise, time, text, gamma)
    metrics: Metrics = {}
    for quarter in range(QUARTERS):
        own = time * QUARTERS // schedule.train_steps == quarter
        metrics[f"noise_error/{quarter + 1}"] = (errors * own).sum() / jnp.maximum(own.sum(), 1)
    return value, metrics


def _posterior(
    model: XLLM, params: Params, batch: DescribedPictures | DescribedLatents
) -> tuple[Array, Array, float]:
    """(Mean, logarithm of the variance, factor) of each picture's latents."""
    if isinstance(batch, DescribedLatents):
        return jnp.asarray(batch.means), 2 * jnp.log(jnp.asarray(batch.deviations)), 1.0
    mean, logvar = model.apply(params, "vae", jnp.asarray(batch.images), method="encode")
    return mean, logvar, cast(Autoencoder, model.networks["vae"]).scaling
