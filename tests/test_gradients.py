"""What TPUs get in the place of autodiff's programs: the same numbers."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xllm_jax.core import mesh
from xllm_jax.models import causal, glm, gradients, layers, rotary


@pytest.fixture
def as_on_tpu(monkeypatch):
    """Switches to the programs of TPUs, on whatever device there is."""
    return lambda: monkeypatch.setattr(mesh, "kind", lambda: "tpu")


def test_a_norm_and_its_gradient(as_on_tpu):
    """Against float64 in NumPy, with a mean that is large beside the spread."""
    rng = np.random.default_rng(0)
    x, slope = rng.normal(3.0, 0.5, (5, 7, 48)), rng.normal(size=(5, 7, 48))
    epsilon = 1e-3
    centered = x - x.mean(-1, keepdims=True)
    inverse = 1 / np.sqrt((centered**2).mean(-1, keepdims=True) + epsilon)
    value = centered * inverse
    # d value_i / d x_j = inverse (d_ij - 1/n - value_i value_j / n), and it is symmetric.
    width = x.shape[-1]
    matrix = np.eye(width) - 1 / width - value[..., :, None] * value[..., None, :] / width
    expected = (matrix @ slope[..., None])[..., 0] * inverse

    as_on_tpu()
    made, back = jax.vjp(lambda x: gradients.normalized(x, epsilon), jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(made, value, atol=2e-6)
    np.testing.assert_allclose(back(jnp.asarray(slope, jnp.float32))[0], expected, atol=4e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("channels", "span"), [(8, 4), (6, 6)])
def test_a_quarter_turn_is_exact(as_on_tpu, dtype, channels, span):
    x = jax.random.normal(jax.random.key(0), (2, 3, 4, channels)).astype(dtype)
    wide = np.asarray(x, np.float32).reshape(2, 3, 4, channels // span, 2, span // 2)
    expected = np.stack([-wide[..., 1, :], wide[..., 0, :]], axis=-2).reshape(x.shape)
    np.testing.assert_array_equal(rotary.turned(x, span), expected)
    as_on_tpu()
    made = jax.jit(rotary.turned, static_argnums=1)(x, span)
    assert made.dtype == jnp.float32
    np.testing.assert_array_equal(made, expected)
    assert "HIGHEST" in jax.jit(rotary.turned, static_argnums=1).lower(x, span).as_text()


def glm_layers():
    network = glm.ChatGLM(vocab=16, width=16, depth=2, heads=2, hidden=32)
    positions = jnp.stack([jnp.arange(6), jnp.maximum(jnp.arange(6) - 3, 0)], axis=-1)
    return (
        network,
        jnp.broadcast_to(positions, (3, 6, 2)),
        jnp.broadcast_to(jnp.arange(6) < 4, (3, 6)),
    )


def causal_layers():
    sizes = dict(vocab=16, width=16, depth=2, heads=4, hidden=24, key_heads=2, rotary_share=0.5)
    positions = jnp.broadcast_to(jnp.arange(6)[:, None], (3, 6, 1))
    return causal.Causal(**sizes), positions, jnp.zeros((3, 6), bool)


@pytest.mark.parametrize("make", [glm_layers, causal_layers])
def test_an_llm_is_the_same_with_them(as_on_tpu, make):
    """States, and gradients of the input and of all parameters."""
    network, positions, context = make()
    x = jax.random.normal(jax.random.key(1), (3, 6, 16))
    segments = jnp.array([[1] * 6, [1] * 5 + [0], [1, 1, 1, 2, 2, 2]])
    weights = jax.random.normal(jax.random.key(2), x.shape)
    params = jax.jit(network.init)(jax.random.key(0), *network.example())

    def loss(params, x):
        states = network.apply(params, x, segments, context, positions)[0]
        return (states * weights).sum(), states

    def run():
        step = jax.jit(jax.grad(lambda *given: loss(*given), (0, 1), has_aux=True))
        return step(params, x), step.lower(params, x).as_text()

    (expected, states), text = run()
    assert "optimization_barrier" not in text
    as_on_tpu()
    (made, same), text = run()
    # Of each scanned layer: what attention reads, and what the feed-forward reads and makes within.
    assert text.count("optimization_barrier") >= 3
    np.testing.assert_allclose(same, states, atol=5e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), made, expected)


def test_a_trained_feed_forward_is_the_same(as_on_tpu):
    block = layers.FeedForward(24, layers.gelu_exact)
    x = jax.random.normal(jax.random.key(0), (4, 8))
    params = block.init(jax.random.key(1), x)

    def loss(params, x):
        return jnp.square(block.apply(params, x)).sum()

    expected = jax.jit(jax.grad(loss, (0, 1)))(params, x)
    as_on_tpu()
    made = jax.jit(jax.grad(functools.partial(loss), (0, 1)))(params, x)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), made, expected
    )


def test_the_kind_of_devices_is_that_of_the_mesh():
    assert mesh.kind() == ""
    with jax.set_mesh(mesh.make({"data": -1})):
        assert mesh.kind() == "cpu"
        assert jax.jit(lambda x: x * len(mesh.kind()))(1) == 3
