"""ITC, ITM and ITG: negatives, shards, what trains, rows without a pair."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from xllm_jax.core import optim
from xllm_jax.core.stage import Optimizer
from xllm_jax.models.blip2_pretraining import SIZES, ContrastModel
from xllm_jax.objectives import blip2_pretraining


@pytest.fixture(scope="module")
def tiny():
    """A small fresh model with a batch of eight pairs."""
    model = ContrastModel(**SIZES["tiny"] | {"depth": 2, "dropout": 0.0})
    params = jax.jit(model.init)(jax.random.key(0), *model.example())["params"]
    random = np.random.default_rng(0)
    features = random.normal(size=(8, 5, model.encoder_width)).astype(np.float32)
    ids = random.integers(4, model.vocabulary - 1, (8, 9)).astype(np.int32)
    mask = np.arange(9) < random.integers(3, 10, (8, 1))
    return model, params, features, ids, mask


def test_negatives_follow_the_weights_and_never_hit_the_own_pair():
    similar = jnp.array([[9.0, 1.0, -50.0], [0.0, 9.0, 2.0], [3.0, 3.0, 9.0]])
    draw = jax.jit(
        jax.vmap(lambda key: blip2_pretraining.sample_negatives(key, similar, similar, "xllm")[0])
    )
    drawn = np.asarray(draw(jax.random.split(jax.random.key(0), 4000)))
    weights = np.asarray(blip2_pretraining.negative_weights(similar, "xllm"))
    shares = weights / weights.sum(-1, keepdims=True)
    assert np.all(drawn != np.arange(3))
    for row in range(3):
        counts = np.bincount(drawn[:, row], minlength=3) / len(drawn)
        np.testing.assert_allclose(counts, shares[row], atol=0.04)
    lavis = np.asarray(blip2_pretraining.negative_weights(similar, "lavis"))
    np.testing.assert_allclose(lavis.sum(-1), 1, rtol=1e-6)
    assert np.all(np.diag(lavis) == 0)
    with pytest.raises(ValueError, match="negative rule"):
        blip2_pretraining.negative_weights(similar, "blip")


def test_detached_itc_trains_one_side_per_direction():
    key = jax.random.split(jax.random.key(0))
    image, text = jax.random.normal(key[0], (4, 3, 8)), jax.random.normal(key[1], (4, 8))
    to_text = lambda i, t: blip2_pretraining.similarities(i, t, 0.07)[0].sum()  # noqa: E731
    image_gradient, text_gradient = jax.grad(to_text, (0, 1))(image, text)
    assert np.abs(image_gradient).max() > 0 and not np.any(text_gradient)


def test_itg_shards_are_means_of_means():
    random = np.random.default_rng(1)
    logits = random.normal(size=(4, 6, 11)).astype(np.float32)
    ids = random.integers(0, 11, (4, 6))
    mask = np.arange(6) < np.array([[6], [5], [2], [3]])
    halves = [
        blip2_pretraining.captioning(logits[part], ids[part], mask[part], 0.1)[0]
        for part in (slice(0, 2), slice(2, 4))
    ]
    whole, _ = blip2_pretraining.captioning(logits, ids, mask, 0.1)
    sharded, _ = blip2_pretraining.captioning(logits, ids, mask, 0.1, shards=2)
    np.testing.assert_allclose(sharded, np.mean(halves), rtol=1e-6)
    assert abs(whole - sharded) > 1e-3


def test_training_lowers_every_loss_and_reaches_every_parameter(tiny):
    model, params, features, ids, mask = tiny
    settings = Optimizer(schedule="constant", peak=2e-3, no_decay=optim.NO_DECAY)
    transformation, _ = optim.make(settings, params, 150)

    @jax.jit
    def step(params, state, key):
        run = lambda p: blip2_pretraining.pair_loss(  # noqa: E731
            model, p, features, ids, mask, key, start=3, train=True
        )
        (_, metrics), gradient = jax.value_and_grad(run, has_aux=True)(params)
        updates, state = transformation.update(gradient, state, params)
        reached = jnp.all(jnp.stack([jnp.any(leaf != 0) for leaf in jax.tree.leaves(gradient)]))
        return optax.apply_updates(params, updates), state, metrics, reached

    state, history = transformation.init(params), []
    for number in range(150):
        params, state, metrics, reached = step(params, state, jax.random.key(number))
        assert reached, "a parameter without gradient"
        history.append(metrics)
    for name in ("itc", "itm", "itg"):
        assert history[-1][name] < 0.8 * history[0][name], name
    assert history[-1]["itc_accuracy"] > 0.9


def test_rows_without_a_pair_count_nowhere():
    random = np.random.default_rng(2)
    weights = np.array([1, 1, 1, 1, 1, 0, 0, 0], np.float32)
    to_text, to_image = random.normal(size=(2, 8, 8)).astype(np.float32)
    whole = blip2_pretraining.contrastive(to_text, to_image, 0.1, weights)
    alone = blip2_pretraining.contrastive(to_text[:5, :5], to_image[:5, :5], 0.1, weights[:5])
    np.testing.assert_allclose(whole, alone, rtol=1e-6)
    per_query = random.normal(size=(24, 3, 2)).astype(np.float32)
    kept = np.concatenate([part[:5] for part in np.split(per_query, 3)])
    whole = blip2_pretraining.matching(per_query, weights)
    np.testing.assert_allclose(whole, blip2_pretraining.matching(kept, weights[:5]), rtol=1e-6)
    for rule in ("xllm", "lavis"):
        draw = lambda key, rule=rule: blip2_pretraining.sample_negatives(  # noqa: E731
            key, to_text, to_image, rule, weights
        )
        images_, texts = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 2000))
        assert set(np.unique(images_)) == set(np.unique(texts)) == {0, 1, 2, 3, 4}
