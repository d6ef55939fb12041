"""The recorded Q-Former in every mode, layer by layer, and its features for retrieval."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xllm_jax.convert.verify.recording import Replay
from xllm_jax.convert.verify.vision_model import Reference
from xllm_jax.data.text.wordpiece import WordPiece
from xllm_jax.models.blip2_pretraining import ContrastModel
from xllm_jax.models.qformer import visible
from xllm_jax.objectives.blip2_pretraining import captioning, smoothed_cross_entropy

ENDS = {
    "self_attention": "attention_end",
    "cross_attention": "cross_attention_end",
    "ffn_query": "query_feed_forward_end",
}
MASKED = -10000.0  # how the reference writes a key that is not seen
SMOOTHING = "label smoothing"


def _runner(reference: Reference):
    """Compiled methods of the stage-1 model: (result, captured values of the Q-Former)."""
    model, params = reference.contrast

    @functools.partial(jax.jit, static_argnames="method")
    def run(method: str, *inputs: object):
        extra = dict(capture_intermediates=True, mutable=["intermediates"])
        result, state = model.apply({"params": params}, *inputs, method=method, **extra)
        return result, state["intermediates"].get("qformer")

    return run


def _layers(replay: Replay, prefix: str, model: ContrastModel, state: dict[str, Any]) -> None:
    """Output of every layer, in order."""
    for number in range(model.depth):
        group, member, place = _place(model, number)
        value = state[group][f"layer_{member}"]["__call__"][0][0][place]
        replay.compare(f"{prefix}_layer_{number:02d}", value)


def _place(model: ContrastModel, number: int) -> tuple[str, int, int]:
    """(stack, number within the group, group) of a layer."""
    frequency = model.cross_attention_frequency
    whole = model.depth // frequency * frequency
    grouped = number < whole
    return (
        "groups" if grouped else "tail",
        number % frequency,
        number // frequency if grouped else 0,
    )


def modes(replay: Replay, reference: Reference) -> None:
    """Queries alone, text alone, both for matching, and captions behind cached queries."""
    model, params = reference.contrast
    run = _runner(reference)
    image, _ = run("normalize", reference.encode(replay.input("pixels"))[0])
    replay.compare("image_embeds", image)
    replay.compare("query_tokens", params["queries"][None])
    (states, _, cache), state = run("image", image)
    replay.compare("query_embeddings", state["embeddings"]["__call__"][0])
    replay.compare("query_last_hidden_state", states)
    _layers(replay, "query", model, state)
    for name, part in ENDS.items():
        value = state["groups"]["layer_0"][part]["__call__"][0][0]
        replay.compare(f"query_layer_00_{name}", value)
    for number in range(model.depth):
        group, member, place = _place(model, number)
        for name, value in zip("kv", cache[group][member]):
            value = jnp.moveaxis(value[place], 1, 2)  # ours keeps heads behind tokens
            replay.compare(f"query_cache_{name}_{number:02d}", value)
    replay.attempt(_texts, model, run, image)
    replay.attempt(_captions, reference, run, image, cache)


def _texts(
    replay: Replay, model: ContrastModel, run: Callable[..., tuple], image: jax.Array
) -> None:
    ids, mask = replay.input("text_input_ids"), replay.input("text_attention_mask") > 0
    (text, _), state = run("text", ids, mask)
    replay.compare("itc_text_embeddings", state["embeddings"]["__call__"][0])
    replay.compare("itc_text_last_hidden_state", text)
    _layers(replay, "itc_text", model, state)
    (rows, per_query), state = run("match", image, ids, mask)
    replay.compare("itm_embeddings", state["embeddings"]["__call__"][0])
    replay.compare("itm_last_hidden_state", rows)
    replay.compare("itm_head", per_query)
    _layers(replay, "itm", model, state)
    replay.compare("itm_attention_mask", np.asarray(visible(model.queries, mask))[:, 0, 0])


def _captions(
    replay: Replay, reference: Reference, run: Callable[..., tuple], image: jax.Array, cache: object
) -> None:
    model, _ = reference.contrast
    mask = replay.input("text_attention_mask") > 0
    ids = replay.input("text_input_ids").copy()
    ids[:, 0] = reference.start
    smoothing = smoothing_of(reference)
    replay.compare("itg_input_ids", ids)
    replay.compare("itg_labels", np.where(mask, ids, -100))
    (_, logits), state = run("caption", ids, mask, cache)
    replay.compare("itg_embeddings", state["embeddings"]["__call__"][0])
    replay.compare("itg_logits", logits)
    _layers(replay, "itg", model, state)
    (_, jointly), _ = run("caption_jointly", image, ids, mask)
    replay.compare("itg_unilm_logits", jointly)
    for name, value in (("itg", logits), ("itg_unilm", jointly)):
        replay.compare(f"{name}_loss", captioning(value, ids, mask, smoothing)[0])
        seen = visible(model.queries, mask, causal=True, cached=name == "itg")
        replay.compare(f"{name}_extended_attention_mask", np.where(seen, 0.0, MASKED))
    losses = smoothed_cross_entropy(logits[:, :-1], jnp.asarray(ids)[:, 1:], smoothing)
    replay.compare("itg_loss_none", (losses * mask[:, 1:]).sum(1))


def smoothing_of(reference: Reference) -> float:
    """Label smoothing of the captions, which the recording's notes list last."""
    found = [row for key, row in reference.info["stage1"].items() if "label_smoothing" in key]
    return float(found[0][-1])


def features(replay: Replay, reference: Reference) -> None:
    """Features of images, of texts, and of pairs, by the images of the first stage."""
    model, _ = reference.contrast
    run, pairs = _runner(reference), reference.other("cases_stage1.npz")
    image, _ = run("normalize", reference.encode(pairs.input("pixels"))[0])
    (states, units, _), _ = run("image", image)
    replay.compare("forward_image_hidden", states)
    replay.compare("extract_image_image_embeds", states)
    replay.compare("extract_image_image_embeds_proj", units)
    ids, mask = pairs.input("text_input_ids"), pairs.input("text_attention_mask") > 0
    (text, _), _ = run("text", ids, mask)
    replay.compare("forward_text_cls", text[:, 0])
    (_, per_query), _ = run("match", image, ids, mask)
    replay.compare("compute_itm", per_query[..., 1].mean(1))
    ids, mask = _tokens(reference)
    (text, units), _ = run("text", ids, mask)
    replay.compare("extract_text_text_embeds", text)
    replay.compare("extract_text_text_embeds_proj", units)
    (rows, _), _ = run("match", image, ids, mask)
    replay.compare("extract_multimodal_multimodal_embeds", rows[:, : model.queries])


def _tokens(reference: Reference) -> tuple[np.ndarray, np.ndarray]:
    """Word pieces of the notes' captions, padded to the longest and not cut."""
    words = WordPiece(reference.weights / "bert-base-uncased")
    captions = reference.info["features"]["captions"]
    most = reference.config["qformer"]["max_position_embeddings"]
    ids, mask = words.rows(captions, most)
    longest = int(mask.sum(1).max())
    return ids[:, :longest], mask[:, :longest] > 0
