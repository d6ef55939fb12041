"""Recorded Hugging Face BLIP-2 folders, read by our other table."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from xllm_jax.convert.files import open_checkpoint
from xllm_jax.convert.verify.recording import Replay
from xllm_jax.convert.verify.vision_model import (
    Reference,
    blip2_options,
    contrast_fields,
    images,
    interface_fields,
    vision_fields,
)
from xllm_jax.core.types import Params
from xllm_jax.models import layers
from xllm_jax.models.blip2_pretraining import ContrastModel
from xllm_jax.models.interfaces import QFormerInterface
from xllm_jax.models.vit import VisionTransformer
from xllm_jax.objectives.blip2_pretraining import similarities

STAGE1, STAGE2 = "hf_blip2_itm_stage1", "hf_blip2_stage2"
WORDS = "embeddings.word_embeddings.weight"


def folders(replay: Replay, reference: Reference) -> None:
    """The second stage's folder, then the first's."""
    replay.attempt(_second, reference)
    replay.attempt(_first, reference)


def _read(
    reference: Reference, folder: str, fields: dict[str, Any], text: bool
) -> tuple[VisionTransformer, Params]:
    """(vision encoder, parameters of both parts)."""
    vision = vision_fields(reference.config)
    tree = reference.read("blip2", folder, blip2_options(fields, "hf", text, vision))
    return VisionTransformer(**vision), tree


def _second(replay: Replay, reference: Reference) -> None:
    # Hugging Face gives the norm behind the encoder the encoder's epsilon.
    epsilon = reference.config["vit"]["norm_eps"]
    fields = interface_fields(reference.config) | {"norm_epsilon": epsilon}
    model = QFormerInterface(**fields)
    vision, tree = _read(reference, STAGE2, fields, text=False)
    params = tree["image_interface"]
    pixels = reference.other("cases_interfaces.npz").input("image_pixels")
    run = jax.jit(lambda p, x: vision.apply({"params": p}, x, capture_intermediates=True))
    (features, lengths), state = run(tree["vision_encoder"], images(pixels))
    state = state["intermediates"]
    replay.compare("stage2_vision_hidden_00", state["embeddings"]["__call__"][0])
    for number in range(vision.depth):
        value = state["layers"]["__call__"][0][0][number]
        replay.compare(f"stage2_vision_hidden_{number + 1:02d}", value)
    run = jax.jit(functools.partial(model.apply, capture_intermediates=True))
    (embeddings, _), state = run({"params": params}, features, lengths)
    normed = state["intermediates"]["norm"]["__call__"][0]
    replay.compare("stage2_vision_last_hidden_state", normed)
    pooled = layers.LayerNorm(model.norm_epsilon).apply({"params": params["norm"]}, normed[:, 0])
    replay.compare("stage2_vision_pooler_output", pooled)
    states = state["intermediates"]["qformer"]["__call__"][0][0]
    replay.compare("stage2_qformer_last_hidden_state", states)
    replay.compare("stage2_language_projection", embeddings)


def _first(replay: Replay, reference: Reference) -> None:
    pairs = reference.other("cases_stage1.npz")
    vocabulary = open_checkpoint(reference.weights / STAGE1).header(WORDS).shape[0]
    epsilon = reference.config["vit"]["norm_eps"]
    fields = contrast_fields(reference.config, vocabulary) | {"norm_epsilon": epsilon}
    model = ContrastModel(**fields)
    vision, tree = _read(reference, STAGE1, fields, text=True)
    ids, mask = pairs.input("text_input_ids"), pairs.input("text_attention_mask") > 0

    @jax.jit
    def run(tree: Params, params: Params, pixels: jax.Array):
        variables = {"params": params | {"temperature": jnp.ones(())}}
        features, _ = vision.apply({"params": tree}, images(pixels))
        image = model.apply(variables, features, method="normalize")
        _, units, _ = model.apply(variables, image, method="image")
        _, text_units = model.apply(variables, ids, mask, method="text")
        _, per_query = model.apply(variables, image, ids, mask, method="match")
        return units, text_units[:, 0], per_query

    units, text_units, per_query = run(
        tree["vision_encoder"], tree["image_interface"], pairs.input("pixels")
    )
    replay.compare("stage1_itc_image_embeds", units)
    replay.compare("stage1_itc_text_embeds", text_units)
    replay.compare("stage1_itc_logits_per_image", similarities(units, text_units, 1.0)[0])
    replay.compare("stage1_itm_logits", per_query.mean(1))
