"""Recorded losses of diffusion training, for noise and for v, and guided outputs."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from xllm_jax.convert.verify.diffusion_schedulers import SCHEDULES
from xllm_jax.convert.verify.recording import Replay
from xllm_jax.models.outputs import sampling, schedulers
from xllm_jax.objectives import denoising

GAMMA, GUIDANCE, RESCALE = 5.0, 7.5, 0.7


def values(replay: Replay, *_: object) -> None:
    """Both schedules, then guidance."""
    for name in ("sd", "audioldm"):
        replay.attempt(_schedule, name)
    without, given = replay.input("uncond"), replay.input("cond")
    guided = (jnp.asarray(without), jnp.asarray(given), GUIDANCE)
    replay.compare("guided", sampling.combined(*guided))
    replay.compare("guided_rescaled", sampling.combined(*guided, rescale=RESCALE))


def _schedule(replay: Replay, name: str) -> None:
    latents, noise, output = (
        jnp.asarray(replay.input(part)) for part in ("x0", "noise", "model_output")
    )
    times = jnp.asarray(replay.input("timesteps"))
    schedule = schedulers.Scheduler(**SCHEDULES[name])
    replay.compare(f"{name}.noisy", denoising.noisy(schedule, latents, noise, times))
    replay.compare(f"{name}.velocity", denoising.velocity(schedule, latents, noise, times))
    replay.compare(f"{name}.snr", denoising.signal_to_noise(schedule)[times])
    for prediction in (schedulers.EPSILON, schedulers.VELOCITY):
        asked = dataclasses.replace(schedule, prediction=prediction)
        case = f"{name}.{prediction}"
        parts = (lambda *_: output, asked, latents, noise, times, latents)
        loss, errors = denoising.loss(*parts)
        replay.compare(f"{case}.mse_per_row", errors)
        replay.compare(f"{case}.loss", loss)
        replay.compare(f"{case}.min_snr_weights", denoising.min_snr_weights(asked, GAMMA)[times])
        replay.compare(f"{case}.min_snr_loss", denoising.loss(*parts, gamma=GAMMA)[0])
