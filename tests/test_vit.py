"""The vision encoder against the recorded EVA ViT, its size and its half-precision distance."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recording import Recording

from xllm_jax.convert import export_tree, import_tree
from xllm_jax.convert.files import open_checkpoint
from xllm_jax.convert.sources import eva_vit
from xllm_jax.core import rules
from xllm_jax.core.errors import UserError
from xllm_jax.models import layers, vit


def build(config: dict, **fields) -> vit.VisionTransformer:
    """The module of a recorded config.json."""
    sizes = config["vit"]
    return vit.VisionTransformer(
        image_size=sizes["img_size"],
        patch=sizes["patch_size"],
        width=sizes["embed_dim"],
        depth=sizes["depth"],
        heads=sizes["num_heads"],
        hidden=sizes["mlp_hidden"],
        epsilon=sizes["norm_eps"],
        **fields,
    )


def images(pixels: np.ndarray) -> np.ndarray:
    """Recorded channels-first pixels to ours."""
    return np.moveaxis(pixels, -3, -1)


@pytest.fixture(scope="module")
def recorded(golden):
    """(config, module, float32 parameters) of the recorded checkpoint."""
    config = json.loads((golden / "vision/config.json").read_text())
    model = build(config)
    side = config["vit"]["img_size"]
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, side, side, 3)))["params"]
    source = open_checkpoint(golden / "vision/weights/eva_vit_g.pth")
    depth, heads = model.depth, model.heads
    table = eva_vit.rows(depth, heads)
    eva_vit.check_depth(source, depth)
    tree, report = import_tree(table, source, shapes, drop=eva_vit.drop(depth))
    assert not report.fresh
    assert report.dropped.keys() == {n for n in source if n not in report.used}
    for name, tensor in export_tree(table, tree).items():
        np.testing.assert_array_equal(tensor, source[name])
    tree = jax.tree.map(lambda leaf: leaf.astype(np.float32), tree)
    return config, model, tree


@pytest.mark.golden
def test_every_recorded_value(golden, recorded):
    config, model, params = recorded
    recording = Recording(golden / "vision/cases_vit.npz")
    _check_hidden_states(recording, model, params)
    _check_other_sizes(recording, model, params)
    _check_norms(recording, golden, config, params)
    recording.assert_all_used()


def _check_hidden_states(recording, model, params):
    run = jax.jit(lambda p, x: model.apply({"params": p}, x, capture_intermediates=True))
    (features, lengths), state = run(params, images(recording.input("pixels")))
    state = state["intermediates"]
    recording.close("output", features)
    np.testing.assert_array_equal(lengths, [features.shape[1]] * features.shape[0])
    recording.close("patch_embed", state["embeddings"]["patches"]["__call__"][0])
    recording.close("embeddings", state["embeddings"]["__call__"][0])
    block = state["layers"]
    for number in range(model.depth):
        recording.close(f"block_{number:02d}", block["__call__"][0][0][number])
    for name, path in {
        "norm1": ("attention_norm",),
        "attn": ("attention",),
        "norm2": ("feed_forward_norm",),
        "mlp_fc1": ("feed_forward", "up"),
        "mlp": ("feed_forward",),
    }.items():
        value = block
        for part in path:
            value = value[part]
        recording.close(f"block_00_{name}", value["__call__"][0][0])
    up = block["feed_forward"]["up"]["__call__"][0][0]
    recording.close("block_00_mlp_gelu", layers.gelu_exact(up))


def _check_other_sizes(recording, model, params):
    for way in ("up", "down"):
        pixels = images(recording.input(f"interp_{way}_pixels"))
        grid = tuple(side // model.patch for side in pixels.shape[1:3])
        table = vit.resize_positions(params["embeddings"]["positions"], grid)
        recording.close(f"interp_{way}_pos_embed", table[None])
        features, _ = jax.jit(model.apply)({"params": params}, pixels)
        recording.close(f"interp_{way}_output", features)


def _check_norms(recording, golden, config, params):
    """The three epsilons, on vectors so small that they show."""
    narrow = open_checkpoint(golden / "vision/weights/blip2_pretrained.pth")
    block = jax.tree.map(lambda leaf: leaf[0], params["layers"]["attention_norm"])
    cases = (
        ("vit", "block_00_norm1", config["vit"]["norm_eps"], block),
        ("vit", "ln_vision", config["ln_vision_eps"], _norm(narrow, "ln_vision")),
        (
            "qformer",
            "qformer_embeddings_LayerNorm",
            config["qformer"]["layer_norm_eps"],
            _norm(narrow, "Qformer.bert.embeddings.LayerNorm"),
        ),
    )
    for source, name, epsilon, norm in cases:
        x = recording.input(f"eps_in_{source}")
        y = layers.LayerNorm(epsilon).apply({"params": norm}, x)
        recording.close(f"eps_out_{name}", y)
    wide = layers.LayerNorm(config["ln_vision_eps"])
    output = recording.arrays["output"]
    recording.close("ln_vision", wide.apply({"params": _norm(narrow, "ln_vision")}, output))


def _norm(source, name):
    return {"scale": source[f"{name}.weight"], "bias": source[f"{name}.bias"]}


def test_scan_remat_and_unroll_agree():
    sizes = vit.SIZES["tiny"]
    x = jax.random.normal(jax.random.key(1), (2, 96, 96, 3))
    plain = vit.VisionTransformer(**sizes)
    params = plain.init(jax.random.key(0), x)
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


def test_drop_path_drops_whole_branches_and_only_in_training():
    model = vit.VisionTransformer(**vit.SIZES["tiny"] | {"depth": 2}, drop_path=0.999999)
    x = jax.random.normal(jax.random.key(1), (4, 96, 96, 3))
    params = model.init(jax.random.key(0), x)
    calm, _ = model.apply(params, x)
    wild, _ = model.apply(params, x, train=True, rngs={"dropout": jax.random.key(2)})
    shorter = vit.VisionTransformer(**vit.SIZES["tiny"] | {"depth": 1})
    first = jax.tree.map(lambda leaf: leaf[:1], params["params"]["layers"])
    alone, _ = shorter.apply({"params": params["params"] | {"layers": first}}, x)
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
