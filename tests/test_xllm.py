"""Media spliced between words: against the recordings, and in orders the reference cannot do."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from recording import Recording

from xllm_jax.convert.sources import chatglm
from xllm_jax.core.batch import Batch, Media, zeros
from xllm_jax.core.errors import UserError
from xllm_jax.data.text import glm_layout
from xllm_jax.data.text.chatglm_tokenizer import ChatGLMTokenizer
from xllm_jax.models import glm
from xllm_jax.models.xllm import XLLM
from xllm_jax.objectives import answer
from xllm_jax.objectives import glm as infilling

LOGITS, INNER = 5e-4, 1e-3


class Given(nn.Module):
    """An encoder that hands over what it is given."""

    def __call__(self, values, lengths, train=False):
        return values, lengths


class Through(nn.Module):
    """An interface without parameters, as the recordings' stand-ins are."""

    activation: Any = staticmethod(lambda x: x)

    def __call__(self, features, lengths, counts=None, train=False):
        return self.activation(features), jnp.full(features.shape[:1], features.shape[1])


# Modality in the recordings: (name of its features, activation of the reference's last projection).
KINDS = {
    "image": ("image_features", "Image", lambda x: x),
    "video": ("frame_features", "Video", lambda x: x),
    "speech": ("speech_features", "Speech", jax.nn.relu),
}


@pytest.fixture(scope="module")
def reference(golden):
    """(model with stand-in encoders, parameters, tokenizer)."""
    llm, params, _ = chatglm.load(golden / "chatglm" / "weights")
    model = XLLM(
        networks={"llm": llm}
        | {f"{kind}_encoder": Given() for kind in KINDS}
        | {f"{kind}_interface": Through(row[2]) for kind, row in KINDS.items()},
        modalities=tuple((kind, f"{kind}_encoder", f"{kind}_interface") for kind in KINDS),
        frozen=dict.fromkeys(KINDS, 0),
    )
    tree = {part: {} for part in model.networks} | {"llm": jax.tree.map(jnp.asarray, params)}
    return model, tree, ChatGLMTokenizer(golden / "chatglm" / "tokenizer")


def recorded_batch(recording, name, kinds, tokenizer) -> tuple[Batch, int]:
    """The recorded rows as a Batch, and the length of their multimodal prefix."""
    ids = recording.input(f"{name}.input_ids").copy()
    layout = [glm_layout.sequence(row, tokenizer.specials, padding_visible=True) for row in ids]
    rows = [glm_layout.sequence(row, tokenizer.specials) for row in ids]
    answers = max(len(row.targets) for row in rows)
    batch = glm_layout.pack([[row] for row in rows], ids.shape[1], answers, tokenizer.specials.pad)
    media, end = {}, 0
    for kind in kinds:
        features, tag, _ = KINDS[kind]
        values = recording.input(f"{name}.{features}")
        values = values if kind == "video" else values[:, None]
        opening, closing = tokenizer.encode(f"<{tag}>"), tokenizer.encode(f"</{tag}>")
        count = values.shape[1] * values.shape[2]
        start = end + len(opening)
        end = start + count + len(closing)
        ids[:, end - len(closing) : end] = closing
        ids[:, start - len(opening) : start] = opening
        index = np.full(ids.shape, -1, np.int32)
        index[:, start : start + count] = np.arange(count)
        lengths = np.full(values.shape[:2], values.shape[2], np.int32)
        media[kind] = Media(values, lengths, None, index)
    stacked = {n: np.stack([getattr(r, n) for r in layout]) for n in ("segments", "positions")}
    return dataclasses.replace(batch, ids=ids, media=media, **stacked), end


def check_case(recording, name, kinds, reference):
    model, params, tokenizer = reference
    batch, prefix = recorded_batch(recording, name, kinds, tokenizer)
    check_layout(recording, name, batch)

    @jax.jit
    def run(params, batch):
        x = model.embed(params, batch)

        def from_embeddings(x):
            return answer_from(model, params, batch, x)

        (loss, logits), by_x = jax.value_and_grad(from_embeddings, has_aux=True)(x)
        whole, by_batch = jax.value_and_grad(
            lambda batch: answer.loss(model, params, batch, chunk=5)[0], allow_int=True
        )(batch)
        values = {kind: media.values for kind, media in by_batch.media.items()}
        return x, loss, logits, by_x, whole, values

    x, loss, logits, by_x, whole, by_values = run(params, batch)
    recording.close(f"{name}.inputs_embeds", x, INNER)
    for kind, start in zip(kinds, prefix_starts(recording, name, kinds)):
        given = "input_speech" if kind == "speech" else "input_image"
        size = recording.arrays[f"{name}.{given}"].shape[1]
        recording.close(f"{name}.{given}", x[:, start : start + size], INNER)
    recording.close(f"{name}.loss", loss, 1e-4)
    recording.close(f"{name}.loss", whole, 1e-4)
    if f"{name}.logits_text" in recording.arrays:
        recording.close(f"{name}.logits_text", logits[:, prefix:], LOGITS)
    check_nll(recording, name, batch, logits)
    check_gradient(recording, f"{name}.grad_inputs_embeds", by_x)
    for kind in kinds:
        if kind != "video":
            check_gradient(recording, f"{name}.grad_{kind}_features", by_values[kind][:, 0])


def prefix_starts(recording, name, kinds):
    sizes = [
        recording.arrays[f"{name}.input_{'speech' if kind == 'speech' else 'image'}"].shape[1]
        for kind in kinds
    ]
    return [0, *np.cumsum(sizes)[:-1]]


def answer_from(model, params, batch, x):
    """(loss, all logits) of spliced embeddings."""
    layout = (batch.segments, batch.context, batch.positions)
    states, _ = model.networks["llm"].apply({"params": params["llm"]}, x, *layout)
    head = lambda y: model.logits(params, y)  # noqa: E731
    loss, _ = answer.answer_loss(head, states, batch.answer_index, batch.targets, batch.weights)
    return loss, head(states)


def check_layout(recording, name, batch):
    recording.equal(f"{name}.position_ids", batch.positions.transpose(0, 2, 1))
    slots = np.broadcast_to(np.arange(batch.ids.shape[1]), batch.ids.shape)
    mask = glm.visible(batch.segments, slots, batch.segments, batch.context, slots)
    recording.equal(f"{name}.attention_mask", ~np.asarray(mask))
    labels = np.full(batch.ids.shape, -100)
    real = batch.weights > 0
    labels[np.nonzero(real)[0], batch.answer_index[real] + 1] = batch.targets[real]
    recording.equal(f"{name}.labels", labels)


def check_nll(recording, name, batch, logits):
    labels = recording.arrays[f"{name}.labels"][:, 1:]
    nll = answer.cross_entropy(logits[:, :-1], np.maximum(labels, 0))
    recording.close(f"{name}.nll", jnp.where(labels >= 0, nll, 0.0), INNER)


def check_gradient(recording, name, value):
    recording.close(name, value, 1e-3 * np.abs(recording.arrays[name]).max())


@pytest.mark.golden
def test_recorded_prefixes(golden, reference):
    """Embeddings, loss and gradients of image, video, speech, and image with speech."""
    recording = Recording(golden / "chatglm" / "cases_multimodal.npz")
    for name, kinds in (
        ("image", ("image",)),
        ("video", ("video",)),
        ("speech", ("speech",)),
        ("both", ("image", "speech")),
    ):
        check_case(recording, name, kinds, reference)
    recording.assert_all_used(except_=["gen_*"])


class Patches(nn.Module):
    """A small encoder with parameters and dropout: `[N, 4]` to `[N, 3, 8]`."""

    def example(self):
        return jnp.zeros((1, 4)), jnp.ones(1, jnp.int32)

    @nn.compact
    def __call__(self, values, lengths, train=False):
        x = nn.Dense(24)(values).reshape(-1, 3, 8)
        return nn.Dropout(0.5, deterministic=not train)(x), jnp.full(values.shape[:1], 3)


class Adapter(nn.Module):
    """A small interface: `[N, 3, 8]` to `[N, 2, width]`."""

    width: int = 12

    def example(self):
        return jnp.zeros((1, 3, 8)), jnp.ones(1, jnp.int32)

    @nn.compact
    def __call__(self, features, lengths, counts=None, train=False):
        x = nn.Dense(self.width)(features[:, :2])
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return x, jnp.full(features.shape[:1], 2)


@pytest.fixture(scope="module")
def small():
    """Image and video share an encoder; sound has its own. Returns (model, parameters)."""
    model = XLLM(
        networks={
            "llm": glm.ChatGLM(vocab=40, width=12, depth=2, heads=3, hidden=24),
            **{"eye": Patches(), "ear": Patches()},
            **{"image_interface": Adapter(), "video_interface": Adapter(), "tube": Adapter()},
        },
        modalities=(
            ("image", "eye", "image_interface"),
            ("video", "eye", "video_interface"),
            ("sound", "ear", "tube"),
        ),
    )
    keys = jax.random.split(jax.random.key(0), len(model.networks))
    params = {
        part: network.init(key, *network.example())["params"]
        for key, (part, network) in zip(keys, model.networks.items())
    }
    return model, params


def filled(batch: Batch, modality: str, index, seed: int) -> Batch:
    """Puts random items into a modality, with their embeddings at `index`."""
    media = batch.media[modality]
    values = np.random.default_rng(seed).normal(size=media.values.shape).astype(np.float32)
    media = dataclasses.replace(media, values=values, index=np.asarray(index, np.int32))
    return dataclasses.replace(batch, media=batch.media | {modality: media})


def test_slots_in_any_order_and_number(small):
    """Two images around a sound, one row without media: each embedding stands where it should."""
    model, params = small
    batch = zeros(2, 8, 2, {"image": (2, (4,)), "sound": (1, (4,))})
    batch.ids[:] = np.arange(16).reshape(2, 8)
    none = [-1] * 8
    batch = filled(batch, "image", [[2, 3, -1, -1, -1, 0, 1, -1], none], 1)
    batch = filled(batch, "sound", [[-1, -1, -1, 0, -1, -1, -1, -1], none], 2)
    x = model.embed(params, batch)
    words = model.networks["llm"].apply({"params": params["llm"]}, batch.ids, method="embed")
    image, counts = model.encode(params, "image", batch.media["image"])
    sound, _ = model.encode(params, "sound", batch.media["sound"])
    assert image.shape == (2, 4, 12) and counts.shape == (2, 2)
    np.testing.assert_array_equal(x[1], words[1])
    expected = np.asarray(words[0]).copy()
    expected[[0, 1, 5, 6]] = image[0][np.array([2, 3, 0, 1])]
    expected[3] = sound[0, 0]
    np.testing.assert_allclose(x[0], expected, atol=1e-6)


def test_items_of_a_row_are_encoded_one_by_one(small):
    """The second frame of a video is what it would be as the first."""
    model, params = small
    batch = filled(zeros(1, 4, 1, {"video": (2, (4,))}), "video", [[0, 1, 2, 3]], 3)
    both, _ = model.encode(params, "video", batch.media["video"])
    second = dataclasses.replace(
        batch.media["video"],
        values=batch.media["video"].values[:, 1:],
        lengths=batch.media["video"].lengths[:, 1:],
        counts=None,
    )
    alone, _ = model.encode(params, "video", second)
    np.testing.assert_allclose(both[:, 2:], alone, atol=1e-6)


def test_a_modality_without_items_is_skipped(small):
    model, params = small
    empty = zeros(1, 4, 1, {"image": (0, (4,)), "sound": (0, (4,))})
    plain = zeros(1, 4, 1)
    np.testing.assert_array_equal(model.embed(params, empty), model.embed(params, plain))
    with pytest.raises(UserError, match="unknown modality 'smell'"):
        model.embed(params, zeros(1, 4, 1, {"smell": (1, (4,))}))


def test_gradients_stop_at_frozen_encoders(small):
    model, params = small
    batch = zeros(1, 6, 2, {"image": (1, (4,))})
    batch = filled(batch, "image", [[0, 1, -1, -1, -1, -1]], 4)
    batch.segments[:], batch.weights[:], batch.context[:, :3] = 1, 1.0, True
    batch.answer_index[:] = [[3, 4]]

    def gradient(model):
        return jax.jit(jax.grad(lambda p: answer.loss(model, p, batch)[0]))(params)

    def size(tree):
        return float(sum(jnp.abs(leaf).sum() for leaf in jax.tree.leaves(tree)))

    frozen = gradient(model)
    assert size(frozen["eye"]) == 0 and size(frozen["image_interface"]) > 0
    trained = gradient(dataclasses.replace(model, frozen={"image": 0}))
    assert size(trained["eye"]) > 0 and size(trained["ear"]) == 0


def test_dropout_follows_the_key_and_spares_frozen_encoders(small):
    model, params = small
    batch = filled(zeros(1, 4, 1, {"image": (1, (4,))}), "image", [[0, 1, -1, -1]], 5)
    keys = jax.random.split(jax.random.key(1))
    one, again, two = (model.embed(params, batch, True, k) for k in (keys[0], keys[0], keys[1]))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, two)
    np.testing.assert_array_equal(
        model.embed(params, batch, False, keys[0]), model.embed(params, batch)
    )


def test_text_objective_reports_perplexity(small):
    model, params = small
    batch = zeros(1, 4, 2)
    batch.segments[:], batch.weights[:] = 1, 1.0
    loss, metrics = infilling.loss(model, params, batch)
    np.testing.assert_allclose(metrics["perplexity"], np.exp(loss), rtol=1e-6)
    assert metrics["count"] == 2
