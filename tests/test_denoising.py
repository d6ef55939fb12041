"""The denoising loss: gradients reach conditions through the network, weights follow Min-SNR."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xllm_jax.models.outputs.schedulers import EPSILON, VELOCITY, Scheduler
from xllm_jax.objectives import denoising

SCHEDULE = Scheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
ROWS = 6


def inputs():
    """(latents, noise, times, conditions)."""
    keys = jax.random.split(jax.random.key(0), 3)
    latents, noise = (jax.random.normal(key, (ROWS, 4, 4, 2)) for key in keys[:2])
    times = jnp.asarray([0, 1, 400, 600, 998, 999])
    return latents, noise, times, jax.random.normal(keys[2], (ROWS, 3, 5))


@pytest.mark.parametrize("prediction", [EPSILON, VELOCITY])
def test_who_knows_the_answer_has_no_loss(prediction):
    schedule = dataclasses.replace(SCHEDULE, prediction=prediction)
    latents, noise, times, conditions = inputs()
    kept = SCHEDULE.alphas()[np.asarray(times)][:, None, None, None]
    answers = {EPSILON: noise, VELOCITY: np.sqrt(kept) * noise - np.sqrt(1 - kept) * latents}
    loss, errors = denoising.loss(
        lambda *_: answers[prediction], schedule, latents, noise, times, conditions
    )
    assert float(loss) < 1e-10 and errors.shape == (ROWS,)


def test_latents_keep_their_variance():
    latents, noise, times, _ = inputs()
    found = denoising.noisy(SCHEDULE, latents, noise, times)
    np.testing.assert_allclose(found[0], latents[0], atol=0.2)
    np.testing.assert_allclose(found[-1], noise[-1], atol=0.35)


def test_gradients_reach_the_conditions_through_the_network():
    latents, noise, times, conditions = inputs()

    def network(x, time, text):
        return x * text.mean((1, 2))[:, None, None, None]

    def loss(conditions, gamma=0.0):
        args = (network, SCHEDULE, latents, noise, times, conditions, gamma)
        return denoising.loss(*args)[0]

    gradient = jax.grad(loss)(conditions)
    step = 1e-2 * gradient / jnp.linalg.norm(gradient)
    slope = (loss(conditions + step) - loss(conditions - step)) / 2
    np.testing.assert_allclose(slope, (gradient * step).sum(), rtol=1e-3)
    assert loss(conditions, 5.0) != loss(conditions)


@pytest.mark.parametrize("prediction, more", [(EPSILON, 0), (VELOCITY, 1)])
def test_min_snr_bounds_the_weight_of_little_noise(prediction, more):
    schedule = dataclasses.replace(SCHEDULE, prediction=prediction)
    ratio = denoising.signal_to_noise(schedule)
    weights = denoising.min_snr_weights(schedule, 5.0)
    np.testing.assert_allclose(weights[ratio < 5], (ratio / (ratio + more))[ratio < 5])
    np.testing.assert_allclose(weights[ratio > 5], (5 / (ratio + more))[ratio > 5])
    assert (ratio > 5).any() and (ratio < 5).any()
