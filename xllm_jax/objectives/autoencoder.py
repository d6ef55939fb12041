"""Reconstruction through a latent space (arXiv 2112.10752, section 3.1): pre-trains the mini VAE.

Absolute differences of pixels and of their neighbors' differences (edges), and a small pull of the
posterior towards a unit normal. The published one also has a discriminator and a learned perceptual
distance; a world of flat colors needs neither.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from xllm_jax.core.batch import DescribedPictures
from xllm_jax.core.types import Metrics, Params
from xllm_jax.models.outputs.autoencoder import deviation
from xllm_jax.models.xllm import XLLM

Array = jax.Array
PART = "autoencoder"


def loss(
    model: XLLM,
    params: Params,
    batch: DescribedPictures,
    key: Array | None = None,
    *,
    train: bool = False,
    edges: float = 1.0,
    prior: float = 1e-4,
) -> tuple[Array, Metrics]:
    """Mean reconstruction error of pixels and edges, and the weighted KL divergence.

    Args:
      model: `models.xllm.XLLM` with the part 'autoencoder'.
      params: {part: parameters}.
      batch: pictures; their words are not read.
      key: of the posterior's sample; without one, its mean is decoded.
      train: is not asked for here.
      edges: weight of the differences between neighboring pixels.
      prior: weight of the KL divergence, per number of the latent.

    Returns:
      (scalar, metrics `pixels`, `edges`, `kl` and `latent_std`, the deviation of the latents).
    """
    images = jnp.asarray(batch.images)
    mean, logvar = model.apply(params, PART, images, method="encode")
    noise = 0.0 if key is None else jax.random.normal(key, mean.shape, mean.dtype)
    latents = mean + deviation(logvar) * noise
    drawn = model.apply(params, PART, latents, method="decode")
    pixels = jnp.abs(drawn - images).mean()
    contours = sum(
        jnp.abs(jnp.diff(drawn, axis=axis) - jnp.diff(images, axis=axis)).mean() for axis in (1, 2)
    )
    kl = 0.5 * (mean**2 + jnp.exp(logvar) - 1 - logvar).mean()
    value = pixels + edges * contours + prior * kl
    metrics: Metrics = {"pixels": pixels, "edges": jnp.asarray(contours), "kl": kl}
    return value, metrics | {"latent_std": latents.std()}
