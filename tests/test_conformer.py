"""Conformer blocks and the speech encoder against slower forms of themselves."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xllm_jax.models import conformer, depthwise
from xllm_jax.models.relative_attention import (
    RelativeAttention,
    by_distance,
    relative_shift,
    rotated,
)


@pytest.mark.parametrize("length", [1, 2, 7])
def test_relative_shift(length):
    scores = np.random.default_rng(0).normal(size=(2, 3, length, 2 * length - 1)).astype("f")
    query, key = np.indices((length, length))
    expected = scores[:, :, query, length - 1 - (query - key)]
    np.testing.assert_array_equal(relative_shift(scores), expected)


def scores_by_table(query, kernel):
    """Every query with the projected position vector of every key's distance, in float64."""
    frames, width = query.shape[1], kernel.shape[0]
    distance = np.arange(frames)[:, None] - np.arange(frames)
    angle = distance[..., None] * np.exp(np.arange(0, width, 2) * (-np.log(10000.0) / width))
    table = np.stack([np.sin(angle), np.cos(angle)], -1).reshape(frames, frames, width)
    kernel, query = np.asarray(kernel, np.float64), np.asarray(query, np.float64)
    back = np.einsum("bqhd,whd->bhqw", query, kernel)
    return np.einsum("bhqw,qkw->bhqk", back, table)


@pytest.mark.parametrize("frames", [1, 7, 64])
def test_rotated_queries_score_as_the_table_of_distances(frames):
    keys = jax.random.split(jax.random.key(frames))
    query = jax.random.normal(keys[0], (2, frames, 3, 4))
    kernel = jax.random.normal(keys[1], (12, 3, 4))
    turned, table = rotated(query, kernel)
    ours = jnp.einsum("bhqw,kw->bhqk", turned, table)
    np.testing.assert_allclose(ours, scores_by_table(query, kernel), atol=1e-4)


def test_rotation_rounds_no_worse_than_the_table_in_bfloat16():
    keys = jax.random.split(jax.random.key(0))
    query = jax.random.normal(keys[0], (1, 300, 2, 32), jnp.bfloat16)
    kernel = jax.random.normal(keys[1], (64, 2, 32)).astype(jnp.bfloat16) / 8
    expected = scores_by_table(query, kernel)
    turned, table = rotated(query, kernel)
    ours = jnp.einsum("bhqw,kw->bhqk", turned, table, preferred_element_type=jnp.float32)
    theirs = relative_shift(by_distance(query, kernel))
    errors = [np.sqrt(np.square(np.asarray(x) - expected).mean()) for x in (ours, theirs)]
    assert errors[0] < 1.5 * errors[1] < 0.05 * expected.std()


def test_both_forms_of_the_attention_have_the_same_gradients():
    x = jax.random.normal(jax.random.key(0), (2, 9, 16))
    visible = np.arange(9) < np.array([9, 5])[:, None]
    forms = [RelativeAttention(2, rotate) for rotate in (False, True)]
    params = jax.jit(forms[0].init)(jax.random.key(1), x, visible)

    def gradient(form):
        loss = lambda params, x: jnp.square(form.apply(params, x, visible)).sum()  # noqa: E731
        return jax.jit(jax.grad(loss, (0, 1)))(params, x)

    gradients = [gradient(form) for form in forms]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), *gradients)


@pytest.mark.parametrize("taps", [1, 4, 31])
def test_depthwise_forms_agree(taps):
    rng = np.random.default_rng(0)
    x, kernel, weights = (
        rng.normal(size=shape).astype(np.float32) for shape in ((2, 9, 5), (taps, 5), (2, 9, 5))
    )

    def results(convolve):
        value, back = jax.vjp(convolve, x, kernel)
        return value, *back(weights)

    pairs = zip(results(depthwise.depthwise_by_shifts), results(depthwise.depthwise_by_conv))
    for one, other in pairs:
        np.testing.assert_allclose(one, other, atol=2e-5)


def test_batch_norm_counts_valid_frames_only():
    x = np.random.default_rng(0).normal(2.0, 3.0, (3, 6, 4)).astype(np.float32)
    valid = np.arange(6) < np.array([6, 2, 0])[:, None]
    params = {"scale": np.ones(4), "bias": np.zeros(4), "mean": np.ones(4), "variance": np.ones(4)}
    y, running = conformer.BatchNorm(train=True).apply({"params": params}, x, valid)
    np.testing.assert_allclose(y[valid].mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(y[valid].var(0), 1, atol=1e-3)
    np.testing.assert_allclose(running["mean"], 0.9 + 0.1 * x[valid].mean(0), rtol=1e-5)
    np.testing.assert_allclose(running["variance"], 0.9 + 0.1 * x[valid].var(0, ddof=1), rtol=1e-5)


SMALL = dict(width=16, hidden=24, heads=2, kernel=5, depth=3, pools=(1, 2), channels=3, bins=10)


@pytest.fixture(scope="module")
def small():
    """A small encoder, its parameters, a batch with padding, and its compiled forms."""
    network = conformer.SpeechEncoder(**SMALL)
    rng = np.random.default_rng(0)
    values = rng.normal(size=(4, 67, 10)).astype(np.float32)
    lengths = np.array([67, 66, 40, 9])
    values *= (np.arange(67) < lengths[:, None])[..., None]
    params = jax.jit(network.init)(jax.random.key(0), values, lengths)["params"]
    return network, params, values, lengths


def test_features_do_not_depend_on_padding(small):
    network, params, values, lengths = small
    run = jax.jit(lambda x, n: network.apply({"params": params}, x, n))
    features, counts = run(values, lengths)
    np.testing.assert_array_equal(counts, ((lengths - 1) // 2) // 2 // 2)
    for row in (1, 3):
        alone, count = run(values[row : row + 1, : lengths[row]], lengths[row : row + 1])
        assert count[0] == counts[row] == alone.shape[1]
        np.testing.assert_allclose(alone[0], features[row, : counts[row]], atol=1e-5)
    assert not np.any(features[3, counts[3] :])


def test_training_statistics_and_dropout(small):
    network, params, values, lengths = small

    def run(key, values):
        return network.apply(
            {"params": params},
            values,
            lengths,
            train=True,
            statistics=True,
            rngs={"dropout": key},
        )

    run = jax.jit(run)
    features, _, updates = run(jax.random.key(1), values)
    again, _, _ = run(jax.random.key(1), values)
    other, _, _ = run(jax.random.key(2), values)
    np.testing.assert_array_equal(features, again)
    assert np.abs(features - other).max() > 1e-3
    behind = values + 5.0 * (np.arange(67) >= lengths[:, None] + 1)[..., None]
    _, _, same = run(jax.random.key(1), behind)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), updates, same)
    shapes = jax.tree.map(lambda x: x.shape, updates)
    assert shapes["blocks_0"]["convolution"]["batch_norm"] == {"mean": (1, 16), "variance": (1, 16)}


def test_bfloat16_stays_near_float32(small):
    network, params, values, lengths = small
    full, counts = jax.jit(network.apply)({"params": params}, values, lengths)
    network = network.clone(dtype=jnp.bfloat16)
    half, same = jax.jit(network.apply)({"params": params}, values, lengths)
    np.testing.assert_array_equal(counts, same)
    assert half.dtype == jnp.bfloat16
    error = np.linalg.norm(half.astype(np.float32) - full) / np.linalg.norm(full)
    print(f"bfloat16 features differ by {error:.1e} of their norm")
    assert error < 2e-2
