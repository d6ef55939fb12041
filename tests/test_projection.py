"""Output projections: published sizes, the choices among them, several layers of the LLM."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xllm_jax.core import lookup, rules
from xllm_jax.core.errors import UserError
from xllm_jax.models.outputs import projection
from xllm_jax.objectives.align import distances

KINDS = (
    "TransformerProjection",
    "InOrderProjection",
    "LinearProjection",
    "QFormerProjection",
)
SMALL = dict(llm_width=6, queries=5, width=8, output_width=3)


def shapes(network):
    return jax.eval_shape(network.init, jax.random.key(0), *network.example())["params"]


def drawn(network, *inputs):
    params = network.init(jax.random.key(1), *inputs)
    return jax.tree.map(  # no bias is 0, no scale 1
        lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), params
    )


@pytest.mark.parametrize(
    ("size", "count"),
    [
        ("stable_diffusion_1", 31_958_784),
        ("stable_diffusion_2", 32_090_112),
        ("audioldm", 31_788_544),
    ],
)
def test_the_published_sizes(size, count):
    """What NExT-GPT's own code has, counted on its models (31M, 32M and 31M in the paper)."""
    leaves = jax.tree.leaves(shapes(projection.TransformerProjection(**projection.SIZES[size])))
    assert sum(math.prod(leaf.shape) for leaf in leaves) == count


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_has_a_place_on_the_mesh(kind):
    name = f"outputs.projection.{kind}"
    _, network = lookup.attribute("xllm_jax.models", name)
    tree = shapes(network(**SMALL, llm_layers=(-1, 1)))
    rules.assign(projection.SHARDING, tree, what="SHARDING", total=False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_tells_nothing_to_its_neighbor(kind):
    """Each run is projected from its own tokens, and depends on all of them."""
    network = getattr(projection, kind)(**SMALL)
    states = jax.random.normal(jax.random.key(2), (2, 1, 4, 6))
    embeddings = jax.random.normal(jax.random.key(3), (2, 4, 6))
    params = drawn(network, states, embeddings)
    whole = network.apply(params, states, embeddings)
    assert whole.shape == (2, 5, 3)
    for token in range(4):
        other = network.apply(params, states.at[0, 0, token].add(1.0), embeddings)
        assert not np.allclose(other[0], whole[0], atol=1e-6)
        np.testing.assert_allclose(other[1], whole[1], atol=1e-6)


@pytest.mark.parametrize(("tokens", "queries"), [(4, 5), (3, 6), (5, 4), (2, 2)])
def test_queries_begin_with_the_tokens_in_their_order(tokens, queries):
    made = np.asarray(projection.in_order(jax.random.key(0), (tokens, queries)))
    for token in range(tokens):
        wanted = [float(query == token + 1) for query in range(queries)]
        assert made[token].tolist() == wanted


def test_a_projection_in_order_is_layers_over_tokens_and_queries():
    """Without layers it is a norm and two maps, rewritten in NumPy's float64."""
    head = projection.InOrderHead(5, 8, 3, 4, False, jnp.float32, "none", 1, depth=0)
    x = jax.random.normal(jax.random.key(2), (2, 4, 6))
    params = drawn(head, x)["params"]
    made = head.apply({"params": params}, x)
    own = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    inside = np.asarray(x, np.float64) @ own["inputs"]["kernel"] + own["inputs"]["bias"]
    mixed = np.einsum("bnd,nq->bqd", inside, own["mixing"]) + own["queries"]
    mean, size = mixed.mean(-1, keepdims=True), mixed.std(-1, keepdims=True)
    norm = own["encoder_norm"]
    normal = (mixed - mean) / np.sqrt(size**2 + 1e-6) * norm["scale"] + norm["bias"]
    wanted = normal @ own["outputs"]["kernel"] + own["outputs"]["bias"]
    np.testing.assert_allclose(made, wanted, atol=1e-4)


def test_several_layers_are_summed():
    network = projection.TransformerProjection(**SMALL, llm_layers=(-1, 1))
    states = jax.random.normal(jax.random.key(2), (2, 2, 4, 6))
    embeddings = jax.random.normal(jax.random.key(3), (2, 4, 6))
    params = drawn(network, states, embeddings)["params"]
    single = projection.TransformerProjection(**SMALL)
    parts = [
        single.apply({"params": {"head_0": params[f"head_{n}"]}}, states[:, n : n + 1], embeddings)
        for n in (0, 1)
    ]
    both = network.apply({"params": params}, states, embeddings)
    np.testing.assert_allclose(both, parts[0] + parts[1], atol=1e-6)


def test_zero_queries_begin_with_equal_outputs():
    def spread(zero):
        network = projection.TransformerProjection(**SMALL, zero_queries=zero)
        x = jax.random.normal(jax.random.key(2), (1, 1, 4, 6))
        made = network.apply(network.init(jax.random.key(1), x, x[:, 0]), x, x[:, 0])
        return float(jnp.abs(made - made[:, :1]).max())

    assert spread(zero=True) < 1e-7
    assert spread(zero=False) > 1e-3


def test_the_distance_has_a_gradient_where_it_is_zero():
    a = jnp.array([[3.0, 4.0], [0.0, 0.0]])
    np.testing.assert_allclose(distances(a, jnp.zeros(2)), [5.0, 0.0])
    gradient = jax.grad(lambda x: distances(x, jnp.zeros(2)).sum())(a)
    np.testing.assert_allclose(gradient, [[0.6, 0.8], [0.0, 0.0]], rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("outputs.projection.NoSuch", r"outputs/projection.py has no 'NoSuch'"),
        ("outputs.projektion.TransformerProjection", "Did you mean 'projection'"),
        ("outputs.projection", "names a folder or a file"),
        ("outputs", "names a folder or a file"),
        ("glm", "names a folder or a file"),
        ("glm.NoSuch", r"glm.py has no 'NoSuch'"),
    ],
)
def test_a_network_that_is_not_there(name, message):
    with pytest.raises(UserError, match=message):
        lookup.attribute("xllm_jax.models", name, "parts.x.network")
