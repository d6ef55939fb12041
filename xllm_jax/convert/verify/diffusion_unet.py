"""The recorded UNet: what each module gives at three sizes, a loss and its gradients, times."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xllm_jax.convert.verify.diffusion_model import (
    Pipeline,
    first_channels,
    inside,
    last_channels,
    ours,
)
from xllm_jax.convert.verify.recording import Replay
from xllm_jax.core.types import Params
from xllm_jax.models import layers
from xllm_jax.models.outputs import unet

OTHERS = ("sample", "timestep", "encoder_hidden_states", "noise", "loss", "out")
"""Arrays of a case that are no module's output, like the gradients."""
GATED = ".net.0"  # of a feed-forward: what its last product is given


def values(replay: Replay, pipeline: Pipeline) -> None:
    """Every case, and the sinusoids of whole and fractional times."""
    for case in sorted({name.partition(".")[0] for name in replay.names("s*.sample")}):
        replay.attempt(_case, pipeline, case)
        if f"{case}.noise" in replay:
            replay.attempt(_gradients, pipeline, case)
    if "time.timestep" in replay:
        replay.attempt(_times, pipeline)


def _inputs(replay: Replay, case: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    return (
        last_channels(replay.input(f"{case}.sample")),
        jnp.asarray(replay.input(f"{case}.timestep")),
        jnp.asarray(replay.input(f"{case}.encoder_hidden_states")),
    )


def _case(replay: Replay, pipeline: Pipeline, case: str) -> None:
    model, params = pipeline.network("unet"), pipeline.params("unet")
    run = jax.jit(lambda p, *x: model.apply({"params": p}, *x, capture_intermediates=True))
    inputs = _inputs(replay, case)
    out, state = run(params, *inputs)
    replay.compare(f"{case}.out", first_channels(out))
    replay.compare(f"{case}.time_proj", unet.sinusoids(inputs[1], model.channels[0]))
    for name in replay.names(f"{case}.*"):
        module = name.partition(".")[2]
        if module not in (*OTHERS, "time_proj") and not module.startswith("grad_"):
            replay.attempt(_module, name, module, state["intermediates"])


def _module(replay: Replay, name: str, module: str, state: Mapping[str, Any]) -> None:
    """One module's output, or one of a level's skips."""
    before, skips, skip = module.rpartition(".skip")
    gated = module.endswith(GATED)
    path = ours(before if skips else module.removesuffix(GATED))
    found = inside(state, path)
    value = found["__call__"][0]
    if gated:
        wide = found["up"]["__call__"][0]
        value = wide[..., 0, :] * layers.gelu_exact(wide[..., 1, :])
    if skips:
        value = value[1][int(skip)]
    elif re.fullmatch(r"down_\d+", path[-1]):
        value = value[0]
    if replay.recorded(name).ndim == 4 and value.ndim == 3:  # a 1x1 convolution of pictures
        batch, _, height, width = replay.recorded(name).shape
        value = value.reshape(batch, height, width, -1)
    replay.compare(name, first_channels(value))


def _gradients(replay: Replay, pipeline: Pipeline, case: str) -> None:
    model, params = pipeline.network("unet"), pipeline.params("unet")
    sample, time, text = _inputs(replay, case)
    noise = last_channels(replay.input(f"{case}.noise"))

    @jax.jit
    def run(params: Params, sample: jax.Array, text: jax.Array) -> jax.Array:
        def loss(sample: jax.Array, text: jax.Array) -> jax.Array:
            return jnp.square(model.apply({"params": params}, sample, time, text) - noise).mean()

        return jax.value_and_grad(loss, (0, 1))(sample, text)

    value, (of_sample, of_text) = run(params, sample, text)
    replay.compare(f"{case}.loss", value)
    replay.compare(f"{case}.grad_sample", first_channels(of_sample))
    replay.compare(f"{case}.grad_encoder_hidden_states", np.asarray(of_text))


def _times(replay: Replay, pipeline: Pipeline) -> None:
    model = pipeline.network("unet")
    time, width = jnp.asarray(replay.input("time.timestep")), model.channels[0]
    replay.compare("time.time_proj", unet.sinusoids(time, width))
    embedding = unet.TimeEmbedding(width, 4 * width)
    params = {"params": pipeline.params("unet")["time"]}
    replay.compare("time.time_embedding", embedding.apply(params, time))
