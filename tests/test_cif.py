"""Integrate-and-fire: padding, counts, precision, gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xllm_jax.models import cif

FIRE = jax.jit(cif.integrate_and_fire, static_argnums=(3, 5))


@pytest.fixture(scope="module")
def utterances():
    rng = np.random.default_rng(0)
    frames = rng.normal(size=(6, 50, 8)).astype(np.float32)
    alpha = rng.uniform(0.05, 0.6, (6, 50)).astype(np.float32)
    return frames, alpha, np.array([50, 43, 31, 20, 7, 0])


@pytest.mark.parametrize("counts", [None, np.array([12, 11, 9, 4, 2, 0])])
def test_result_does_not_depend_on_padding(utterances, counts):
    """Alone or in a longer batch with rubbish behind the end, an utterance fires the same."""
    frames, alpha, lengths = utterances
    together = FIRE(frames, alpha, lengths, 24, counts)
    behind = np.full((6, 9, 8), 1e3, np.float32)
    wider = FIRE(
        np.concatenate([frames, behind], 1), np.pad(alpha, ((0, 0), (0, 9))), lengths, 24, counts
    )
    np.testing.assert_array_equal(together.counts, wider.counts)
    np.testing.assert_allclose(together.embeddings, wider.embeddings, atol=1e-5)
    for row in (0, 2, 4):
        size = lengths[row]
        alone = FIRE(
            frames[row : row + 1, :size],
            alpha[row : row + 1, :size],
            lengths[row : row + 1],
            24,
            None if counts is None else counts[row : row + 1],
        )
        assert alone.counts[0] == together.counts[row]
        np.testing.assert_allclose(alone.embeddings[0], together.embeddings[row], atol=1e-5)


def test_training_fires_the_wanted_number(utterances):
    frames, alpha, lengths = utterances
    counts = np.array([12, 20, 1, 19, 3, 0])
    fired = FIRE(frames, alpha, lengths, 24, counts)
    np.testing.assert_array_equal(fired.counts, counts)
    np.testing.assert_allclose(fired.quantity, cif.mask_weights(alpha, lengths).sum(-1))


def test_capacity_cuts_and_says_so(utterances):
    frames, alpha, lengths = utterances
    whole = FIRE(frames, alpha, lengths, 24)
    cut = FIRE(frames, alpha, lengths, 4)
    np.testing.assert_array_equal(cut.counts, np.minimum(whole.counts, 4))
    np.testing.assert_allclose(cut.embeddings, whole.embeddings[:, :4], atol=1e-6)


def test_bfloat16_fires_as_often_as_float32():
    """Weights are summed in float32, so the compute dtype changes embeddings but no count."""
    rng = np.random.default_rng(1)
    frames = jnp.asarray(rng.normal(size=(64, 300, 16)), jnp.bfloat16)
    alpha = jnp.asarray(rng.uniform(0, 0.4, (64, 300)), jnp.float32)
    lengths = rng.integers(20, 301, 64)
    half = FIRE(frames, alpha, lengths, 96)
    full = FIRE(frames.astype(jnp.float32), alpha, lengths, 96)
    assert half.embeddings.dtype == jnp.bfloat16
    np.testing.assert_array_equal(half.counts, full.counts)
    np.testing.assert_array_equal(half.frames, full.frames)
    error = np.abs(half.embeddings.astype(jnp.float32) - full.embeddings).max()
    assert error <= 2**-8 * float(np.abs(full.embeddings).max())


@pytest.mark.parametrize("counts", [None, np.array([0, 2])])
def test_gradient_is_finite_for_empty_rows(counts):
    def total(alpha):
        fired = cif.integrate_and_fire(jnp.ones((2, 5, 3)), alpha, jnp.array([0, 5]), 4, counts)
        return fired.embeddings.sum() + fired.quantity.sum()

    assert np.isfinite(jax.jit(jax.grad(total))(jnp.full((2, 5), 0.3))).all()
