"""Media spliced between words, in any order and number."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from xllm_jax.core.batch import ConversationBatch, zeros
from xllm_jax.core.errors import UserError
from xllm_jax.models import glm
from xllm_jax.models.xllm import XLLM
from xllm_jax.objectives import answer

LOGITS, INNER = 5e-4, 1e-3


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
        part: jax.jit(network.init)(key, *network.example())["params"]
        for key, (part, network) in zip(keys, model.networks.items())
    }
    return model, params


def filled(batch: ConversationBatch, modality: str, index, seed: int) -> ConversationBatch:
    """Puts random items into a modality, with their embeddings at `index`."""
    media = batch.media[modality]
    values = np.random.default_rng(seed).normal(size=media.values.shape).astype(np.float32)
    media = dataclasses.replace(media, values=values, index=np.asarray(index, np.int32))
    return dataclasses.replace(batch, media=batch.media | {modality: media})


def test_slots_in_any_order_and_number(small):
    """Two images around a sound, one row without media: each embedding stands where it should."""
    model, params = small
    batch = zeros(2, 8, 2, 2, {"image": (2, (4,)), "sound": (1, (4,))})
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
    batch = filled(zeros(1, 4, 1, 2, {"video": (2, (4,))}), "video", [[0, 1, 2, 3]], 3)
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
    empty = zeros(1, 4, 1, 2, {"image": (0, (4,)), "sound": (0, (4,))})
    plain = zeros(1, 4, 1, 2)
    np.testing.assert_array_equal(model.embed(params, empty), model.embed(params, plain))
    with pytest.raises(UserError, match="unknown modality 'smell'"):
        model.embed(params, zeros(1, 4, 1, 2, {"smell": (1, (4,))}))


def test_gradients_stop_at_frozen_encoders(small):
    model, params = small
    batch = zeros(1, 6, 2, 2, {"image": (1, (4,))})
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
    batch = filled(zeros(1, 4, 1, 2, {"image": (1, (4,))}), "image", [[0, 1, -1, -1]], 5)
    keys = jax.random.split(jax.random.key(1))
    one, again, two = (model.embed(params, batch, True, k) for k in (keys[0], keys[0], keys[1]))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, two)
    np.testing.assert_array_equal(
        model.embed(params, batch, False, keys[0]), model.embed(params, batch)
    )


def test_text_objective_reports_perplexity(small):
    model, params = small
    batch = zeros(1, 4, 2, 2)
    batch.segments[:], batch.weights[:] = 1, 1.0
    loss, metrics = answer.loss(model, params, batch, perplexity=True)
    np.testing.assert_allclose(metrics["perplexity"], np.exp(loss), rtol=1e-6)
    assert metrics["count"] == 2
