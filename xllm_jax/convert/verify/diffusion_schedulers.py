"""Recorded schedulers: every one's table along a fake network, and the noise schedules."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from xllm_jax.convert.verify.recording import Replay
from xllm_jax.models.outputs import sampling, scheduler_config, schedulers

SCHEDULES = {
    "sd": dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
    "audioldm": dict(beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear"),
    "linear": dict(beta_start=0.0001, beta_end=0.02, beta_schedule="linear"),
}


def values(replay: Replay, *_: object) -> None:
    """Every case of the settings, then the schedules."""
    for name, case in replay.about()["cases"].items():
        replay.attempt(_case, name, case)
    for name, fields in SCHEDULES.items():
        schedule = schedulers.Scheduler(**fields)
        replay.compare(f"{name}.betas", schedule.betas())
        replay.compare(f"{name}.alphas_cumprod", schedule.alphas())


def _case(replay: Replay, name: str, case: dict[str, Any]) -> None:
    config = case["config"] | {"_class_name": case["scheduler"]}
    scheduler, steps = scheduler_config.parse(config), case["steps"]
    table = scheduler.table(steps)
    times = scheduler.times(steps)
    if f"{name}.timesteps" in replay and replay.recorded(f"{name}.timesteps").dtype.kind == "i":
        times = times.astype(np.int64)
    replay.compare(f"{name}.timesteps", times)
    replay.compare(f"{name}.init_noise_sigma", table.start)
    if isinstance(scheduler, schedulers.Euler | schedulers.DpmSolver):
        replay.compare(f"{name}.sigmas", scheduler.sigmas(steps))
    factors, shifts = (_along(replay.input(f"model_{letter}"), table) for letter in "ac")
    pattern = jnp.asarray(replay.input("pattern"))
    rows = {time: number for number, time in enumerate(np.asarray(table.calls.time).tolist())}
    known = jnp.asarray(list(rows))
    places = jnp.asarray(list(rows.values()))

    def fake(x: jnp.ndarray, time: jnp.ndarray) -> jnp.ndarray:
        row = places[jnp.argmin(jnp.abs(known - time[0]))]
        return jnp.asarray(factors)[row] * x + jnp.asarray(shifts)[row] * pattern

    noise = jnp.asarray(replay.input("noise"))
    _, traced = sampling.draw(table, fake, noise, trace=True)
    assert traced is not None
    outputs, latents = traced
    replay.compare(f"{name}.model_output", outputs)
    replay.compare(f"{name}.x", jnp.concatenate([(noise * table.start)[None], latents]))


def _along(polynomial: np.ndarray, table: schedulers.Table) -> np.ndarray:
    """A factor of the fake network at every call: a polynomial of the time, in float64 first."""
    share = table.calls.time.astype(np.float64) / 1000
    return (polynomial.astype(np.float64) @ share ** np.arange(3)[:, None]).astype(np.float32)
