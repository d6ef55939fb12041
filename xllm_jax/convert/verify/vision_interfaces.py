"""The recorded image and video interfaces, down to what stands before the LLM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from xllm_jax.convert import export_tree
from xllm_jax.convert.verify.recording import Replay
from xllm_jax.convert.verify.vision_model import (
    Reference,
    interface_fields,
    interface_table,
    norms,
)
from xllm_jax.core.types import Params
from xllm_jax.models.interfaces import QFormerInterface

VIDEO = "xllm_video_checkpoint_4.pth"


def interfaces(replay: Replay, reference: Reference) -> None:
    """Image, then video, which runs its own queries and adapter on the same Q-Former."""
    model, params = reference.interface()
    run = _runner(model)
    replay.attempt(_image, reference, model, params, run)
    if "video_pixels" in replay:
        replay.attempt(_video, reference, model, params, run)


def _runner(model: QFormerInterface):
    @jax.jit
    def run(params: Params, features: jax.Array, lengths: jax.Array):
        variables = {"params": params}
        (embeddings, _), state = model.apply(
            variables, features, lengths, capture_intermediates=True
        )
        state = state["intermediates"]
        return embeddings, state["norm"]["__call__"][0], state["qformer"]["__call__"][0][0]

    return run


def _image(
    replay: Replay,
    reference: Reference,
    model: QFormerInterface,
    params: Params,
    run: Callable[..., tuple[jax.Array, ...]],
) -> None:
    features, lengths = reference.encode(replay.input("image_pixels"))
    embeddings, normed, states = run(params, features, lengths)
    replay.compare("image_ln_vision", normed)
    replay.compare("image_query_output", states)
    replay.compare("image_quasi_linguistic", embeddings)
    if "image_lm_input_image" in replay:
        prompt = _prompt(replay, "image")
        replay.compare("image_lm_input_image", prompt(embeddings))
        replay.attempt(_stub_gradient, reference, model, params, features, lengths, prompt)


def _stub_gradient(
    replay: Replay,
    reference: Reference,
    model: QFormerInterface,
    params: Params,
    features,
    lengths,
    prompt,
) -> None:
    """The stand-in for the LLM's loss is the mean square of what it would read."""

    def loss(params):
        embeddings, _ = model.apply({"params": params}, features, lengths)
        return jnp.square(prompt(embeddings)).mean()

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    replay.compare("image_stub_loss", value)
    order = reference.info["interfaces"]["image_stub_grad_norm order"]
    tensors = export_tree(interface_table(model), gradient)
    replay.compare("image_stub_grad_norm", norms(tensors, order))


def _video(
    replay: Replay,
    reference: Reference,
    model: QFormerInterface,
    params: Params,
    run: Callable[..., tuple[jax.Array, ...]],
) -> None:
    own = _video_params(reference, params, "video")
    pixels = replay.input("video_pixels")
    clips, frames = pixels.shape[:2]
    features, lengths = reference.encode(pixels.reshape(clips * frames, *pixels.shape[2:]))
    embeddings, _, states = run(own, features, lengths)
    replay.compare("video_query_output", states)
    replay.compare("video_proj", embeddings)
    embeddings = embeddings.reshape(clips, -1, model.llm_width)
    replay.compare("video_quasi_linguistic", embeddings)
    if "video_lm_input_image" in replay:
        prompt = _prompt(replay, "video")
        replay.compare("video_lm_input_image", prompt(embeddings))
        replay.compare("video_stub_loss", jnp.square(prompt(embeddings)).mean())
    if "video_model_image_quasi_linguistic" in replay:
        inputs = reference.encode(replay.input("image_pixels"))
        embeddings = run(_video_params(reference, params, "image"), *inputs)[0]
        replay.compare("video_model_image_quasi_linguistic", embeddings)


def _video_params(reference: Reference, params: dict[str, Any], modality: str) -> dict[str, Any]:
    """Queries and adapter of a video run; the rest is the stage-2 Q-Former's."""
    fields = interface_fields(reference.config)
    parts = ("image_interface", "video_interface")  # the file holds both, in pieces
    options = {
        "pieces": {part: ["adapter"] for part in parts},
        "sizes": dict.fromkeys(parts, fields),
    }
    own = reference.read("xllm", VIDEO, options)
    return params | own[f"{modality}_interface"]


def _prompt(replay: Replay, name: str) -> Callable[[jax.Array], jax.Array]:
    """The reference's prompt around the embeddings: words before, media, words after."""
    words = replay.input("lm_word_embeddings")
    before, after = (words[replay.input(f"{name}_prompt_ids_{end}")] for end in ("before", "after"))

    def wrap(embeddings: jax.Array) -> jax.Array:
        rows = [jnp.broadcast_to(x, (len(embeddings), *x.shape)) for x in (before, after)]
        return jnp.concatenate([rows[0], embeddings, rows[1]], axis=1)

    return wrap
