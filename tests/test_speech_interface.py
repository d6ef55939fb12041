"""The speech interface: padding, counts, precision, and the signature."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xllm_jax.core import rules
from xllm_jax.models import speech_interface
from xllm_jax.models.speech_interface import SpeechInterface


@pytest.fixture(scope="module")
def small():
    """A small interface and its compiled call."""
    network = SpeechInterface(
        encoder_width=8, max_tokens=10, width=12, depth=1, heads=2, hidden=16, positions=16,
        llm_width=6, dropout=0.0,
    )  # fmt: skip
    params = jax.jit(network.init)(jax.random.key(0), *network.example())["params"]
    run = jax.jit(lambda x, n, c=None: network.apply({"params": params}, x, n, c))
    features = np.random.default_rng(0).normal(size=(4, 20, 8)).astype(np.float32)
    return network, params, run, features, np.array([20, 15, 6, 0])


def test_counts_are_those_asked_for(small):
    _, _, run, features, lengths = small
    wanted = np.array([7, 10, 3, 0])
    embeddings, counts = run(features, lengths, wanted)
    assert embeddings.shape == (4, 10, 6)
    np.testing.assert_array_equal(counts, wanted)
    behind = np.arange(10) >= wanted[:, None]
    assert not np.any(embeddings[behind]) and np.all(np.any(embeddings[~behind], axis=-1))


def test_predicted_embeddings_do_not_depend_on_padding(small):
    _, _, run, features, lengths = small
    embeddings, counts = run(features, lengths)
    noisy = features + 9.0 * (np.arange(20) >= lengths[:, None])[..., None]
    others, same = run(noisy.astype(np.float32), lengths)
    np.testing.assert_array_equal(counts, same)
    np.testing.assert_allclose(embeddings, others, atol=1e-5)
    assert counts[3] == 0 and np.all(counts[:3] > 0)


def test_bfloat16_changes_no_count(small):
    network, params, run, features, lengths = small
    half = network.clone(dtype=jnp.bfloat16)
    embeddings, counts = jax.jit(half.apply)({"params": params}, features, lengths)
    exact, same = run(features, lengths)
    np.testing.assert_array_equal(counts, same)
    assert embeddings.dtype == jnp.bfloat16
    error = np.linalg.norm(embeddings.astype(np.float32) - exact) / np.linalg.norm(exact)
    print(f"bfloat16 embeddings differ by {error:.1e} of their norm")
    assert error < 3e-2


def test_every_parameter_has_a_sharding():
    for size, fields in speech_interface.SIZES.items():
        network = SpeechInterface(**fields)
        tree = jax.eval_shape(network.init, jax.random.key(0), *network.example())["params"]
        rules.assign(speech_interface.SHARDING, tree, what=size, total=False)
        assert {"cif", "c_former", "adapter"} == set(tree)
