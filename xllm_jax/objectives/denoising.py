"""Denoising through a frozen diffusion network: what a condition is worth for drawing a picture.

The network is asked for what its scheduler predicts, noise or v (arXiv 2202.00512), at a random
time; Min-SNR (arXiv 2303.09556) takes weight from times at which little noise is left. Gradients
reach the conditions through the network, whose parameters are the caller's to keep still.

Letters: B rows; `...` the axes of latents.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from xllm_jax.models.outputs.autoencoder import deviation
from xllm_jax.models.outputs.sampling import Network
from xllm_jax.models.outputs.schedulers import VELOCITY, Scheduler

Array = jax.Array


class Drawn(NamedTuple):
    """What a network is shown of some pictures.

    Attributes:
      latents, noise: `[B, ...]` float32; no gradient passes the former.
      times: `[B]` int32.
    """

    latents: Array
    noise: Array
    times: Array


def draws(
    scheduler: Scheduler,
    mean: Array,
    logvar: Array,
    scaling: float,
    key: Array | None,
    late: float = 1.0,
) -> Drawn:
    """Latents, noise and one time for every picture.

    One time falls into each of B equal parts of the schedule, so that the error of a batch varies
    less.

    Args:
      scheduler: whose times are drawn.
      mean, logvar: of the latents, `[B, ...]`.
      scaling: of the autoencoder.
      key: without one, times are spread evenly and the noise is always the same.
      late: times are as frequent as their power `late` - 1 says: at 1 all alike, at 2 the noisiest
        most of all.
    """
    moments, times, drawn = jax.random.split(jax.random.key(0) if key is None else key, 3)
    latents = mean + deviation(logvar) * jax.random.normal(moments, mean.shape)
    latents = jax.lax.stop_gradient(latents) * scaling
    rows = len(latents)
    spread = 0.5 if key is None else jax.random.uniform(times, (rows,))
    share = ((jnp.arange(rows) + spread) / rows) ** (1 / late)
    # Rounding may bring the last share to 1, whose time no schedule has.
    time = jnp.minimum(share * scheduler.train_steps, scheduler.train_steps - 1).astype(jnp.int32)
    return Drawn(latents, jax.random.normal(drawn, latents.shape), time)


def loss(
    network: Network,
    scheduler: Scheduler,
    latents: Array,
    noise: Array,
    times: Array,
    conditions: Array,
    gamma: float = 0.0,
) -> tuple[Array, Array]:
    """Mean squared error of the network's output.

    Args:
      network: (noisy latents, times, conditions) to its output.
      scheduler: that it was trained with.
      latents: `[B, ...]` of pictures, times the autoencoder's scaling.
      noise: like them, of variance 1.
      times: `[B]` int32, steps of the schedule.
      conditions: `[B, tokens, width]`.
      gamma: of Min-SNR; 0 weighs all times the same.

    Returns:
      (scalar float32, `[B]` errors without weights).
    """
    weighed, errors = each(network, scheduler, latents, noise, times, conditions, gamma)
    return weighed.mean(), errors


def each(
    network: Network,
    scheduler: Scheduler,
    latents: Array,
    noise: Array,
    times: Array,
    conditions: Array,
    gamma: float = 0.0,
) -> tuple[Array, Array]:
    """Errors of single pictures: (with Min-SNR's weights, without), `[B]` float32; see `loss`."""
    output = network(noisy(scheduler, latents, noise, times), times, conditions)
    wanted = target(scheduler, latents, noise, times)
    errors = jnp.square(output.astype(jnp.float32) - wanted).mean(range(1, wanted.ndim))
    weights = jnp.asarray(min_snr_weights(scheduler, gamma), jnp.float32)[times] if gamma else 1.0
    return errors * weights, errors


def noisy(scheduler: Scheduler, latents: Array, noise: Array, times: Array) -> Array:
    """Latents at times of a schedule, `[B, ...]` float32; arguments as of `loss`."""
    signal, spread = _shares(scheduler, latents, times)
    return signal * latents + spread * noise


def target(scheduler: Scheduler, latents: Array, noise: Array, times: Array) -> Array:
    """What the network is asked for, `[B, ...]` float32: noise or v; arguments as of `loss`."""
    if scheduler.prediction == VELOCITY:
        return velocity(scheduler, latents, noise, times)
    return noise.astype(jnp.float32)


def velocity(scheduler: Scheduler, latents: Array, noise: Array, times: Array) -> Array:
    """v: the direction in which latents turn into noise, `[B, ...]`; arguments as of `loss`."""
    signal, spread = _shares(scheduler, latents, times)
    return signal * noise - spread * latents


def signal_to_noise(scheduler: Scheduler) -> np.ndarray:
    """The picture's variance over that of noise, at every time: `[train_steps]` float64."""
    alphas = scheduler.alphas()
    return alphas / (1 - alphas)


def min_snr_weights(scheduler: Scheduler, gamma: float) -> np.ndarray:
    """Min-SNR weights at every time: `[train_steps]` float64, for what the scheduler predicts."""
    ratio = signal_to_noise(scheduler)
    more = 1 if scheduler.prediction == VELOCITY else 0
    return np.minimum(ratio, gamma) / (ratio + more)


def _shares(scheduler: Scheduler, latents: Array, times: Array) -> tuple[Array, Array]:
    """Factors of the picture and of noise, `[B, 1, ...]` float32."""
    alphas = scheduler.alphas()
    shape = (-1, *[1] * (latents.ndim - 1))
    return tuple(
        jnp.asarray(np.sqrt(share), jnp.float32)[times].reshape(shape)
        for share in (alphas, 1 - alphas)
    )  # pyright: ignore[reportReturnType]  two of them
