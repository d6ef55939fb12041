"""The MLP projector and the perceiver resampler against torch and against NumPy in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from xllm_jax.core import rules
from xllm_jax.models import interfaces, mlp_interface, perceiver

MLP = dict(encoder_width=6, hidden=10, llm_width=8, skip=1)
RESAMPLER = dict(
    queries=3, width=12, depth=2, heads=3, hidden=20, encoder_width=6, llm_width=8, skip=1
)


def drawn(model):
    """Parameters of which no bias is zero and no scale one."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), *model.example())["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(0, 0.4, x.shape).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def features():
    return np.random.default_rng(1).normal(size=(2, 8, 6)).astype(np.float32)


@pytest.fixture(scope="module")
def mlp():
    model = mlp_interface.MLPInterface(**MLP)
    return model, drawn(model)


@pytest.fixture(scope="module")
def resampler():
    model = perceiver.PerceiverInterface(**RESAMPLER)
    return model, drawn(model)


def run(made, features, lengths=(8, 8), **options):
    model, params = made
    call = jax.jit(lambda p, x, n: model.apply({"params": p}, x, n, **options))
    return call(params, jnp.asarray(features), jnp.asarray(lengths))


def close(ours, expected, tolerance=1e-5):
    expected = np.asarray(expected)
    np.testing.assert_allclose(ours, expected, atol=tolerance * np.abs(expected).max())


def test_mlp_is_torch_s_sequence(mlp, features):
    """Values, and gradients to the inputs and the kernels; LLaVA leaves the class token out."""
    model, params = mlp
    peer = torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.GELU(), torch.nn.Linear(10, 8))
    with torch.no_grad():
        for place, name in ((0, "hidden"), (2, "adapter")):
            peer[place].weight.copy_(torch.tensor(params[name]["kernel"].T))
            peer[place].bias.copy_(torch.tensor(params[name]["bias"]))
    x = torch.tensor(features, requires_grad=True)
    weights = torch.randn(2, 7, 8)
    expected = peer(x[:, 1:])
    (expected * weights).sum().backward()
    found, counts = run(mlp, features, (8, 5))
    close(found, expected.detach())
    np.testing.assert_array_equal(counts, [7, 4])
    assert model.made_of(8) == 7

    def loss(params, x):
        return jnp.sum(model.apply({"params": params}, x, jnp.asarray([8, 8]))[0] * weights.numpy())

    gradients, inputs = jax.jit(jax.grad(loss, (0, 1)))(params, jnp.asarray(features))
    close(inputs, x.grad)
    close(gradients["hidden"]["kernel"].T, peer[0].weight.grad)


def norm(x, p, epsilon=1e-5):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * p["scale"] + p["bias"]


def resampled(params, features, lengths):
    """Figure 5 of Flamingo's paper in float64, an image, a layer and a head at a time."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    found = []
    for one, length in zip(features.astype(np.float64), lengths):
        seen = one[RESAMPLER["skip"] : length] @ p["project"]["kernel"] + p["project"]["bias"]
        x = p["queries"]
        for number in range(RESAMPLER["depth"]):
            layer = jax.tree.map(lambda leaf, n=number: leaf[n], p["layers"])
            asking = norm(x, layer["query_norm"])
            both = np.concatenate([norm(seen, layer["feature_norm"]), asking])
            added = np.zeros_like(x)
            for head in range(RESAMPLER["heads"]):
                query, key, value = (
                    rows @ layer[name]["kernel"][:, head]
                    for name, rows in (("query", asking), ("key", both), ("value", both))
                )
                scores = query @ key.T / np.sqrt(query.shape[1])
                share = np.exp(scores - scores.max(1, keepdims=True))
                share /= share.sum(1, keepdims=True)
                added += share @ value @ layer["out"]["kernel"][head]
            x = x + added
            inner = norm(x, layer["feed_forward_norm"]) @ layer["up"]["kernel"]
            x = x + np.maximum(inner, 0) ** 2 @ layer["down"]["kernel"]
        found.append(norm(x, p["norm"]) @ p["adapter"]["kernel"] + p["adapter"]["bias"])
    return np.stack(found)


def test_resampler_is_flamingo_s(resampler, features):
    lengths = (8, 5)
    found, counts = run(resampler, features, lengths)
    close(found, resampled(resampler[1], features, lengths))
    np.testing.assert_array_equal(counts, [3, 3])


def test_resampler_sees_no_feature_behind_the_length(resampler, features):
    other = features.copy()
    other[:, 5:] = 100.0
    found, again = (run(resampler, x, (5, 0))[0] for x in (features, other))
    np.testing.assert_array_equal(found, again)
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(run(resampler, features, (5, 0))[1], [3, 0])


def test_resampler_unrolled_with_remat_and_in_half_precision(resampler, features):
    model, params = resampler
    expected = np.asarray(run(resampler, features)[0])
    again = run((model.clone(unroll=2, remat="all"), params), features)[0]
    close(again, expected)
    half = run((model.clone(dtype=jnp.bfloat16), params), features)[0]
    assert half.dtype == jnp.bfloat16
    assert np.abs(half.astype(np.float32) - expected).mean() < 0.05 * np.abs(expected).mean()


@pytest.mark.parametrize("name", ["mlp", "resampler"])
def test_the_sections_one_by_one_are_the_whole(name, features, request):
    """What a cache of the first section holds leads to the same embeddings, dropped once."""
    made = request.getfixturevalue(name)
    expected, counts = run(made, features, (8, 6))
    first, between = run(made, features, (8, 6), sections=(0, 1))
    found, again = run(made, first, between, sections=(1, 2))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_array_equal(again, counts)


FILES = ((mlp_interface, "MLPInterface"), (perceiver, "PerceiverInterface"))


@pytest.mark.parametrize(("file", "name"), FILES)
def test_every_size_has_sharding_rows_and_sections_for_all(file, name):
    for size in file.SIZES.values():
        model = getattr(file, name)(**size)
        shapes = jax.eval_shape(model.init, jax.random.key(0), *model.example())["params"]
        rules.assign(file.SHARDING, shapes, what=f"{file.__name__} SHARDING")
        assert {leaf for names in model.SECTIONS for leaf in names} == shapes.keys()


def test_published_sizes():
    """LLaVA 1.5's projector by its published shapes; the resampler's as the paper has them."""
    shapes = {}
    for file, name, size in (
        (mlp_interface, "MLPInterface", "llava"),
        (perceiver, "PerceiverInterface", "flamingo"),
    ):
        model = getattr(file, name)(**file.SIZES[size])
        tree = jax.eval_shape(model.init, jax.random.key(0), *model.example())["params"]
        shapes |= {f"{size}/{path}": x.shape for path, x in rules.flatten(tree).items()}
    assert shapes["llava/hidden/kernel"] == (1024, 4096)
    assert shapes["llava/adapter/kernel"] == (4096, 4096)
    assert shapes["flamingo/queries"] == (64, 1536)
    assert shapes["flamingo/layers/query/kernel"] == (6, 1536, 16, 96)
    assert shapes["flamingo/layers/up/kernel"] == (6, 1536, 6144)
    assert interfaces.QFormerInterface(width=8).made_of(5) == 32
