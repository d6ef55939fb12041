"""Denoising latents of pictures beside their words (arXiv 2006.11239; 2112.10752, equation 3).

Pre-trains the mini diffusion model: UNet and text encoder learn together, the autoencoder is done.
"""

from __future__ import annotations

import functools
from typing import cast

import jax
import jax.numpy as jnp

from xllm_jax.core.batch import DescribedPictures
from xllm_jax.core.types import Metrics, Params
from xllm_jax.models.outputs import schedulers
from xllm_jax.models.outputs.autoencoder import Autoencoder
from xllm_jax.models.xllm import XLLM
from xllm_jax.objectives import denoising

Array = jax.Array
SCHEDULE = schedulers.Ddim(**schedulers.SIZES["stable_diffusion_1_5"])
QUARTERS = 4


def loss(
    model: XLLM,
    params: Params,
    batch: DescribedPictures,
    key: Array | None = None,
    *,
    train: bool = False,
    gamma: float = 0.0,
) -> tuple[Array, Metrics]:
    """Mean squared error of the predicted noise, at one random time for every picture.

    Args:
      model: `models.xllm.XLLM` with the parts 'autoencoder', 'text_encoder' and 'unet'.
      params: {part: parameters}.
      batch: pictures and their words.
      key: of times and noise; without one, times are spread evenly and the noise is always one.
      train: is not asked for here.
      gamma: of Min-SNR weights (arXiv 2303.09556); 0 weighs all times the same.

    Returns:
      (scalar, metrics `noise_error/q`: the error without weights in each quarter of the schedule).
    """
    mean, logvar = model.apply(params, "autoencoder", jnp.asarray(batch.images), method="encode")
    scaling = cast(Autoencoder, model.networks["autoencoder"]).scaling
    latents, noise, time = denoising.draws(SCHEDULE, mean, logvar, scaling, key)
    text = model.apply(params, "text_encoder", batch.ids, method="states")
    network = functools.partial(model.apply, params, "unet")
    value, errors = denoising.loss(network, SCHEDULE, latents, noise, time, text, gamma)
    metrics: Metrics = {}
    for quarter in range(QUARTERS):
        own = time * QUARTERS // SCHEDULE.train_steps == quarter
        metrics[f"noise_error/{quarter + 1}"] = (errors * own).sum() / jnp.maximum(own.sum(), 1)
    return value, metrics
