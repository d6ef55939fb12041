"""Reconstruction through a latent space (arXiv 2112.10752, section 3.1): pre-trains the mini VAE.

Absolute and squared differences of pixels, absolute ones of their neighbors' differences (edges),
and a small pull of the posterior towards a unit normal. Pixels count the more the further they
stand out from their picture: a small object is what a picture is about, and most of the area is
background. The published one also has a discriminator and a learned perceptual distance; a world of
flat colors needs neither.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from xllm_jax.core.batch import DescribedPictures
from xllm_jax.core.types import Metrics, Params
from xllm_jax.models.outputs.autoencoder import deviation
from xllm_jax.models.xllm import XLLM

Array = jax.Array
PART = "vae"


def loss(
    model: XLLM,
    params: Params,
    batch: DescribedPictures,
    key: Array | None = None,
    *,
    train: bool = False,
    edges: float = 1.0,
    prior: float = 1e-4,
    floor: float = 0.2,
) -> tuple[Array, Metrics]:
    """Mean reconstruction error of pixels and edges, and the weighted KL divergence.

    Args:
      model: `models.xllm.XLLM` with the part 'vae'.
      params: {part: parameters}.
      batch: pictures; their words are not read.
      key: of the posterior's sample; without one, its mean is decoded.
      train: is not asked for here.
      edges: weight of the differences between neighboring pixels.
      prior: weight of the KL divergence, per number of the latent.
      floor: weight of a pixel that does not stand out at all, see `salience`.

    Returns:
      (scalar, metrics `pixels`, `edges`, `kl` and `latent_std`, the deviation of the latents).
    """
    images = jnp.asarray(batch.images)
    mean, logvar = model.apply(params, PART, images, method="encode")
    noise = 0.0 if key is None else jax.random.normal(key, mean.shape, mean.dtype)
    latents = mean + deviation(logvar) * noise
    drawn = model.apply(params, PART, latents, method="decode")
    apart = drawn - images
    pixels = (salience(images, floor) * (jnp.abs(apart) + jnp.square(apart))).mean()
    contours = sum(
        jnp.abs(jnp.diff(drawn, axis=axis) - jnp.diff(images, axis=axis)).mean() for axis in (1, 2)
    )
    kl = 0.5 * (mean**2 + jnp.exp(logvar) - 1 - logvar).mean()
    value = pixels + edges * contours + prior * kl
    metrics: Metrics = {"pixels": pixels, "edges": jnp.asarray(contours), "kl": kl}
    return value, metrics | {"latent_std": latents.std()}


def salience(images: Array, floor: float) -> Array:
    """How much a pixel counts: its distance from the picture's mean color over the mean distance.

    Args:
      images: `[B, height, width, 3]` float32.
      floor: is added everywhere.

    Returns:
      `[B, height, width, 1]` float32; 1 + floor on average, and 1 + floor all over a picture of one
      color.
    """
    mean = images.mean((1, 2), keepdims=True)
    apart = jnp.abs(images - mean).mean(-1, keepdims=True)
    usual = apart.mean((1, 2), keepdims=True)
    return floor + jnp.where(usual > 0, apart / jnp.where(usual > 0, usual, 1.0), 1.0)
