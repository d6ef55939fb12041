"""The recorded autoencoder: what its modules give on both ways, its Gaussian and its bounds."""

from __future__ import annotations

import jax

from xllm_jax.convert.verify.diffusion_model import (
    Pipeline,
    first_channels,
    inside,
    last_channels,
    ours,
)
from xllm_jax.convert.verify.recording import Replay
from xllm_jax.models.outputs import autoencoder


def values(replay: Replay, pipeline: Pipeline) -> None:
    """Every case on both ways, and the bounds of a variance."""
    for case in sorted({name.partition(".")[0] for name in replay.names("s*.image")}):
        replay.attempt(_encode, pipeline, case)
        replay.attempt(_decode, pipeline, case)
    if "clamp.parameters" in replay:
        replay.attempt(_bounds)


def _encode(replay: Replay, pipeline: Pipeline, case: str) -> None:
    model = pipeline.network("vae")
    pictures = last_channels(replay.input(f"{case}.image"))
    mean, logvar = _run(replay, pipeline, f"{case}.enc.", "encode", pictures)
    replay.compare(f"{case}.mean", first_channels(mean))
    replay.compare(f"{case}.logvar", first_channels(logvar))
    std = autoencoder.deviation(logvar)
    replay.compare(f"{case}.std", first_channels(std))
    sample = mean + std * last_channels(replay.input(f"{case}.posterior_noise"))
    replay.compare(f"{case}.posterior_sample", first_channels(sample))
    replay.compare(f"{case}.scaled_latents", first_channels(model.scaling * sample))


def _decode(replay: Replay, pipeline: Pipeline, case: str) -> None:
    latents = last_channels(replay.input(f"{case}.z"))
    pictures = _run(replay, pipeline, f"{case}.dec.", "decode", latents)
    replay.compare(f"{case}.decoded", first_channels(pictures))


def _run(replay: Replay, pipeline: Pipeline, prefix: str, method: str, x: jax.Array):
    """The outcome of one way; compares the outputs of modules whose names start with `prefix`."""
    model, params = pipeline.network("vae"), pipeline.params("vae")
    run = jax.jit(
        lambda p, x: model.apply({"params": p}, x, method=method, capture_intermediates=True)
    )
    out, state = run(params, x)
    for name in replay.names(f"{prefix}*"):
        path = ours(name.removeprefix(prefix), "vae")
        value = inside(state["intermediates"], path)["__call__"][0]
        replay.compare(name, first_channels(value))
    return out


def _bounds(replay: Replay) -> None:
    mean, logvar = autoencoder.gaussian(last_channels(replay.input("clamp.parameters")))
    replay.compare("clamp.mean", first_channels(mean))
    replay.compare("clamp.logvar", first_channels(logvar))
    std = autoencoder.deviation(logvar)
    replay.compare("clamp.std_relative", first_channels(std / (1 + std)))
