"""UNet and autoencoder: published sizes, meshes, half precision, recomputation, odd sides."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import forked
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import virtual_devices

from xllm_jax.core import lookup, rules
from xllm_jax.models.outputs import autoencoder, unet, unet_blocks

HERE = Path(__file__).parent
FILES = {"outputs.unet.UNet": unet, "outputs.autoencoder.Autoencoder": autoencoder}


def shapes(network):
    return jax.eval_shape(network.init, jax.random.key(0), *network.example())["params"]


@pytest.mark.parametrize(
    ("name", "size", "count"),
    [
        ("outputs.unet.UNet", "stable_diffusion_1_5", 859_520_964),
        ("outputs.unet.UNet", "stable_diffusion_2_1", 865_910_724),
        ("outputs.autoencoder.Autoencoder", "stable_diffusion_1_5", 83_653_863),
        ("outputs.autoencoder.Autoencoder", "stable_diffusion_2_1", 83_653_863),
    ],
)
def test_the_published_sizes(name, size, count):
    """As diffusers counts them on the published configurations."""
    file, network = lookup.attribute("xllm_jax.models", name)
    tree = shapes(network(**file.SIZES[size]))
    assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == count
    specs = rules.flatten(rules.assign(file.SHARDING, tree, what=f"{name} SHARDING"))
    whole = {path for path, leaf in rules.flatten(tree).items() if leaf.size > 1e5}
    assert {path for path in whole if not any(specs[path])} == set()


@pytest.mark.parametrize("name", FILES)
def test_every_size_has_a_sharding_row_for_each_leaf(name):
    file, network = lookup.attribute("xllm_jax.models", name)
    for size in file.SIZES.values():
        rules.assign(file.SHARDING, shapes(network(**size)), what=f"{name} SHARDING")


def test_meshes_equal_one_device():
    code = "import runpy; runpy.run_path('outputs_mesh_check.py', run_name='__main__')"
    done = forked.run(
        [sys.executable, "-c", code],
        cwd=HERE,
        env=virtual_devices.environment(8),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    projections = {"transformer", "in order", "linear", "q-former"}
    assert set(found) == {"unet", "autoencoder", *projections}
    for meshes in found.values():
        assert len(meshes) == 2
        for outputs, gradients in meshes.values():
            assert outputs < 2e-5
            assert gradients < 2e-4


def drawn(network, *arguments):
    """Parameters in which no bias is 0 and no scale 1."""
    params = jax.jit(network.init)(jax.random.key(0), *arguments)
    return jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), params
    )


SMALL = dict(channels=(16, 32), depth=1, groups=4)


def example(kind):
    """(small network, arguments), with sides that do not halve evenly."""
    key = jax.random.key(3)
    if kind is unet.UNet:
        text, time = jax.random.normal(key, (2, 5, 24)), jnp.array([3.0, 951.5])
        network = kind(**SMALL, transformers=(False, True), heads=(2, 4), text_width=24)
        return network, (jax.random.normal(key, (2, 5, 6, 4)), time, text)
    return kind(**SMALL), (jax.random.normal(key, (2, 8, 12, 3)),)


@pytest.mark.parametrize("kind", [unet.UNet, autoencoder.Autoencoder])
def test_half_precision_is_near(kind):
    network, arguments = example(kind)
    params = drawn(network, *arguments)
    value = jax.jit(network.apply)(params, *arguments)
    half = network.clone(dtype=jnp.bfloat16)
    near = jax.jit(half.apply)(params, *arguments)
    assert near.dtype == jnp.float32
    distance = np.linalg.norm(near - value) / np.linalg.norm(value)
    print(f"{kind.__name__}, bfloat16 against float32: relative distance {distance:.2e}")
    assert distance < 3e-2


def test_recomputation_changes_nothing():
    network, arguments = example(unet.UNet)
    params = drawn(network, *arguments)

    def gradients(network):
        loss = lambda p: jnp.square(network.apply(p, *arguments)).mean()  # noqa: E731
        return jax.jit(jax.grad(loss))(params)

    plain, again = gradients(network), gradients(network.clone(remat="all"))
    for one, other in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(other, one, atol=1e-5 * max(1, np.abs(one).max()))


def test_group_norm_takes_its_statistics_in_float32():
    x = 1000 + jax.random.normal(jax.random.key(0), (2, 6, 6, 8))
    norm = unet_blocks.GroupNorm(4)
    params = norm.init(jax.random.key(0), x)
    exact = np.asarray(x, np.float64).reshape(2, -1, 4, 2)
    exact = (exact - exact.mean((1, 3), keepdims=True)) / exact.std((1, 3), keepdims=True)
    np.testing.assert_allclose(norm.apply(params, x), exact.reshape(x.shape), atol=2e-3)
    narrow = unet_blocks.GroupNorm(4, dtype=jnp.bfloat16).apply(params, x)
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_allclose(narrow.astype(jnp.float32), exact.reshape(x.shape), atol=2e-2)


def test_an_odd_picture_is_refused_by_the_encoder():
    network, _ = example(autoencoder.Autoencoder)
    assert network.factor == 2
    with pytest.raises(ValueError, match="9 x 16 is no multiple of 2"):
        jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 9, 16, 3)))
