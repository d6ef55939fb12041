"""The vision encoder: its forms, its published size, what it refuses."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xllm_jax.convert.sources import eva_vit
from xllm_jax.core import mesh, rules
from xllm_jax.core.errors import UserError
from xllm_jax.models import row_chunks, vit


def test_scan_remat_and_unroll_agree():
    sizes = vit.SIZES["tiny"]
    x = jax.random.normal(jax.random.key(1), (2, 96, 96, 3))
    plain = vit.VisionTransformer(**sizes)
    params = jax.jit(plain.init)(jax.random.key(0), x)
    value, _ = jax.jit(plain.apply)(params, x)
    other = vit.VisionTransformer(**sizes, unroll=6, remat="all")
    np.testing.assert_allclose(jax.jit(other.apply)(params, x)[0], value, atol=2e-5)
    rules.assign(vit.SHARDING, params["params"], what="vit.SHARDING")
    half = vit.VisionTransformer(**sizes, dtype=jnp.bfloat16)
    near = jax.jit(half.apply)(params, x)[0]
    assert near.dtype == jnp.bfloat16
    distance = np.linalg.norm(near - value) / np.linalg.norm(value)
    print(f"ViT tiny, bfloat16 against float32: relative distance {distance:.2e}")
    assert distance < 2e-2


@pytest.mark.parametrize(("chunk", "count"), [(4, 2), (3, 2), (1, 6), (6, 1), (64, 1)])
def test_chunk_by_chunk_is_the_same(chunk, count):
    """Parameters, outputs and gradients; drop path draws for every image."""
    sizes = vit.SIZES["tiny"] | {"depth": 2}
    x = jax.random.normal(jax.random.key(1), (6, 96, 96, 3))
    whole, parted = (vit.VisionTransformer(**sizes, chunk=n) for n in (0, chunk))
    params = jax.jit(whole.init)(jax.random.key(0), x)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(parted.init)(jax.random.key(0), x), params)

    def run(model):
        def loss(params):
            out = model.apply(params, x)[0]
            return jnp.square(out).mean(), out

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    (gradient, out), (other, same) = run(whole), run(parted)
    np.testing.assert_allclose(same, out, atol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), other, gradient)
    assert row_chunks.split(6, chunk) == (1, count)
    wild = functools.partial(parted.clone(drop_path=0.5).apply, train=True)
    dropped = jax.jit(wild)(params, x, rngs={"dropout": jax.random.key(2)})[0]
    apart = np.abs(np.asarray(dropped - out)).max((1, 2)) > 1e-4
    assert apart.sum() > 0 and np.isfinite(dropped).all()


def test_chunks_divide_what_a_device_has():
    found = [row_chunks.split(rows, 8) for rows in (145, 144, 32, 7, 1)]
    assert found == [(1, 29), (1, 18), (1, 4), (1, 1), (1, 1)]
    x = jnp.arange(24).reshape(12, 2)
    for chunks in ((1, 3), (2, 3), (4, 1), (4, 3)):
        made = row_chunks.part(x, chunks)
        assert made.shape == (chunks[1], 12 // chunks[1], 2)
        np.testing.assert_array_equal(row_chunks.join(made, chunks), x)
    # Of each of four devices the first rows go first: none sends any.
    assert row_chunks.part(x, (4, 3))[0, :, 0].tolist() == [0, 6, 12, 18]


def test_chunks_that_nobody_chose(monkeypatch):
    """As the kind of device likes; 149 is a prime, and one image at a time would be slow."""
    assert [row_chunks.split(rows, None) for rows in (144, 7)] == [(1, 1), (1, 1)]
    monkeypatch.setitem(row_chunks.USUAL, "cpu", 8)
    with jax.set_mesh(mesh.make({}, jax.devices()[:1])):
        found = [row_chunks.split(rows, None)[1] for rows in (144, 145, 149, 10, 8, 3)]
        assert found == [18, 29, 1, 2, 1, 1]
        assert row_chunks.split(149, 8) == (1, 149) and row_chunks.split(144, 0) == (1, 1)
        model = vit.VisionTransformer(**vit.SIZES["tiny"] | {"depth": 1})
        shapes = jax.eval_shape(model.init, jax.random.key(0), *model.example())
        x = jnp.zeros((16, 96, 96, 3))
        loops = {
            train: str(jax.make_jaxpr(functools.partial(model.apply, train=train))(shapes, x))
            for train in (False, True)
        }
    parted = {train: "dynamic_update_slice" in text for train, text in loops.items()}
    assert parted == {False: True, True: False}


def test_drop_path_drops_whole_branches_and_only_in_training():
    model = vit.VisionTransformer(**vit.SIZES["tiny"] | {"depth": 2}, drop_path=0.999999)
    x = jax.random.normal(jax.random.key(1), (4, 96, 96, 3))
    params = jax.jit(model.init)(jax.random.key(0), x)
    calm, _ = jax.jit(model.apply)(params, x)
    train = jax.jit(functools.partial(model.apply, train=True))
    wild, _ = train(params, x, rngs={"dropout": jax.random.key(2)})
    shorter = vit.VisionTransformer(**vit.SIZES["tiny"] | {"depth": 1})
    first = jax.tree.map(lambda leaf: leaf[:1], params["params"]["layers"])
    alone, _ = jax.jit(shorter.apply)({"params": params["params"] | {"layers": first}}, x)
    np.testing.assert_allclose(wild, alone, atol=1e-5)  # block 0 never drops, block 1 always
    assert np.abs(calm - alone).max() > 1e-4


def test_real_size_is_the_published_one():
    """As transformers' BLIP-2, less its stored zero key bias and its norm behind the encoder."""
    torch = pytest.importorskip("torch")
    from transformers import Blip2VisionConfig, Blip2VisionModel

    with torch.device("meta"):
        peer = Blip2VisionModel(Blip2VisionConfig())
    published = sum(parameter.numel() for parameter in peer.parameters())
    model = vit.VisionTransformer(**vit.SIZES["eva_vit_g"])
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert count + model.depth * model.width + 2 * model.width == published == 985_952_256
    features, _ = jax.eval_shape(model.apply, shapes, jnp.zeros((1, 224, 224, 3)))
    assert features.shape == (1, 257, 1408)


def test_bad_sizes_are_told():
    with pytest.raises(ValueError, match="does not divide"):
        vit.patches(jnp.zeros((1, 30, 28, 3)), 14)
    with pytest.raises(UserError, match="has 12 blocks"):
        eva_vit.check_depth([f"blocks.{n}.norm1.weight" for n in range(12)], 39)
