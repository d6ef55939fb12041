"""Recorded image, video and speech prefixes: what the LLM reads, its loss and its gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from xllm_jax.convert.verify import chatglm_decode
from xllm_jax.convert.verify.chatglm_model import Reference
from xllm_jax.convert.verify.recording import Replay
from xllm_jax.core.batch import ConversationBatch, Media
from xllm_jax.core.types import Params
from xllm_jax.data.text import glm_layout, token_rows
from xllm_jax.data.text.chatglm_tokenizer import ChatGLMTokenizer
from xllm_jax.models import decoder_cache
from xllm_jax.models.xllm import XLLM
from xllm_jax.objectives import answer

Array = jax.Array
# Modality: its recorded features, its tag, the activation of the reference's last projection.
KINDS = {
    "image": ("image_features", "Image", lambda x: x),
    "video": ("frame_features", "Video", lambda x: x),
    "speech": ("speech_features", "Speech", jax.nn.relu),
}


@dataclasses.dataclass(frozen=True)
class Given:
    """An encoder that hands over the recorded features."""

    def apply(
        self, variables: Mapping, values: Array, lengths: Array, train: bool = False, rngs=None
    ) -> tuple[Array, Array]:
        """(values, lengths) as they came."""
        return values, lengths


@dataclasses.dataclass(frozen=True)
class Through:
    """An interface without parameters, as the recorded stand-ins are."""

    activation: Callable[[Array], Array]

    def apply(
        self,
        variables: Mapping,
        features: Array,
        lengths: Array,
        counts=None,
        train=False,
        rngs=None,
    ) -> tuple[Array, Array]:
        """(activated features, how many)."""
        return self.activation(features), jnp.full(features.shape[:1], features.shape[1])


def media(replay: Replay, reference: Reference) -> None:
    """Training batches by their recorded features, then answers behind recorded prefixes."""
    model, params = reference.loaded
    networks = {f"{kind}_encoder": Given() for kind in KINDS}
    networks |= {f"{kind}_interface": Through(row[2]) for kind, row in KINDS.items()}
    whole = XLLM(
        networks={"llm": model} | networks,
        modalities=tuple((kind, f"{kind}_encoder", f"{kind}_interface") for kind in KINDS),
        frozen=dict.fromkeys(KINDS, 0),
    )
    tree = {part: {} for part in whole.networks} | {"llm": params}
    for name in (n.removesuffix(".input_ids") for n in replay.names("*.input_ids")):
        kinds = [kind for kind, row in KINDS.items() if f"{name}.{row[0]}" in replay]
        if kinds:
            replay.attempt(_training, name, kinds, whole, tree, reference.tokenizer)
        if f"{name}.sequences" in replay:
            replay.attempt(chatglm_decode.behind_media, reference, whole, tree, name)


def _training(
    replay: Replay,
    name: str,
    kinds: list[str],
    model: XLLM,
    params: Params,
    words: ChatGLMTokenizer,
) -> None:
    batch, starts, prefix = _batch(replay, name, kinds, words)
    _compare_layout(replay, name, batch)
    x, loss, logits, by_x, by_values = _run(model, params, batch)
    replay.compare(f"{name}.inputs_embeds", x)
    for kind, start in zip(kinds, starts):
        given = f"{name}.input_{'speech' if kind == 'speech' else 'image'}"
        if given in replay:
            replay.compare(given, x[:, start : start + replay.recorded(given).shape[1]])
    replay.compare(f"{name}.loss", loss)
    replay.compare(f"{name}.logits_text", logits[:, prefix:])
    replay.compare(f"{name}.nll", token_losses(logits, labels_of(batch)))
    replay.compare(f"{name}.grad_inputs_embeds", by_x)
    for kind in kinds:
        found = by_values[kind]
        replay.compare(f"{name}.grad_{KINDS[kind][0]}", found if kind == "video" else found[:, 0])


def _batch(
    replay: Replay, name: str, kinds: list[str], words: ChatGLMTokenizer
) -> tuple[ConversationBatch, list[int], int]:
    """(the recorded rows, start of each modality's tags, length of the whole prefix)."""
    ids = replay.input(f"{name}.input_ids").copy()
    layout = [glm_layout.sequence(row, words.specials, padding_visible=True) for row in ids]
    rows = [glm_layout.sequence(row, words.specials) for row in ids]
    answers = max(len(row.targets) for row in rows)
    batch = token_rows.pack([[row] for row in rows], ids.shape[1], answers, words.specials.pad)
    found, starts, end = {}, [], 0
    for kind in kinds:
        features, tag, _ = KINDS[kind]
        values = replay.input(f"{name}.{features}")
        values = values if kind == "video" else values[:, None]
        opening, closing = words.encode(f"<{tag}>"), words.encode(f"</{tag}>")
        count = values.shape[1] * values.shape[2]
        starts.append(end)
        start = end + len(opening)
        end = start + count + len(closing)
        ids[:, start - len(opening) : start] = opening
        ids[:, end - len(closing) : end] = closing
        index = np.full(ids.shape, -1, np.int32)
        index[:, start : start + count] = np.arange(count)
        lengths = np.full(values.shape[:2], values.shape[2], np.int32)
        found[kind] = Media(values, lengths, None, index)
    stacked = {n: np.stack([getattr(r, n) for r in layout]) for n in ("segments", "positions")}
    return dataclasses.replace(batch, ids=ids, media=found, **stacked), starts, end


def _run(model: XLLM, params: Params, batch: ConversationBatch) -> tuple:
    """(embeddings, loss, logits, gradient of the embeddings, gradients of the features)."""

    @jax.jit
    def run(params: Params, batch: ConversationBatch) -> tuple:
        x = model.embed(params, batch)
        layout = (batch.segments, batch.context, batch.positions)

        def head(states: Array) -> Array:
            return model.logits(params, states)

        def from_embeddings(x: Array) -> tuple[Array, Array]:
            states, _ = model.networks["llm"].apply({"params": params["llm"]}, x, *layout)
            answers = (batch.answer_index, batch.targets, batch.weights)
            return answer.answer_loss(head, states, *answers)[0], head(states)

        def from_batch(batch: ConversationBatch) -> Array:
            return answer.loss(model, params, batch)[0]

        (_, logits), by_x = jax.value_and_grad(from_embeddings, has_aux=True)(x)
        loss, by_batch = jax.value_and_grad(from_batch, allow_int=True)(batch)
        return x, loss, logits, by_x, {k: m.values for k, m in by_batch.media.items()}

    return run(params, batch)


def _compare_layout(replay: Replay, name: str, batch: ConversationBatch) -> None:
    replay.compare(f"{name}.position_ids", batch.positions.transpose(0, 2, 1))
    slots = np.broadcast_to(np.arange(batch.ids.shape[1]), batch.ids.shape)
    mask = decoder_cache.visible(batch.segments, slots, batch.segments, batch.context, slots)
    replay.compare(f"{name}.attention_mask", ~np.asarray(mask))
    replay.compare(f"{name}.labels", labels_of(batch))


def labels_of(batch: ConversationBatch) -> np.ndarray:
    """The reference's labels `[B, T]`: the token that stands here, -100 where none is taught."""
    labels = np.full(batch.ids.shape, -100)
    real = batch.weights > 0
    labels[np.nonzero(real)[0], batch.answer_index[real] + 1] = batch.targets[real]
    return labels


def token_losses(logits: Array, labels: np.ndarray) -> Array:
    """Negative log likelihood of the next label `[B, T - 1]`, 0 where none is taught."""
    after = labels[:, 1:]
    losses = answer.cross_entropy(logits[:, :-1], np.maximum(after, 0))
    return jnp.where(after >= 0, losses, 0.0)
