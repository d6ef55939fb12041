"""SigLIP's vision tower against transformers: features, gradients, pixels, folders in and out."""

from __future__ import annotations

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from xllm_jax.assembly import parameters
from xllm_jax.convert import files, run_export, run_import
from xllm_jax.convert.sources import siglip as table
from xllm_jax.core import base_description, checkpoint, rules
from xllm_jax.core.errors import UserError
from xllm_jax.data.media import image
from xllm_jax.models import siglip

# 30 pixels are 3 patches of 8, and 6 are left over, as of 384 pixels in patches of 14.
SMALL = dict(image_size=30, patch=8, width=48, depth=3, heads=3, hidden=80)
NAMES = dict(
    image_size="image_size",
    patch="patch_size",
    width="hidden_size",
    depth="num_hidden_layers",
    heads="num_attention_heads",
    hidden="intermediate_size",
)


def config(sizes: dict, **more) -> SiglipVisionConfig:
    return SiglipVisionConfig(**{NAMES[name]: value for name, value in sizes.items()}, **more)


@pytest.fixture(scope="module")
def peer():
    torch.manual_seed(0)
    made = SiglipVisionModel._from_config(config(SMALL), attn_implementation="eager")
    with torch.no_grad():
        for leaf in made.parameters():
            leaf.add_(0.2 * torch.randn_like(leaf))
    return made.eval()


@pytest.fixture(scope="module")
def folder(peer, tmp_path_factory):
    """As transformers 5 saves it."""
    made = tmp_path_factory.mktemp("siglip")
    peer.save_pretrained(made / "tower")
    (made / "tower" / "preprocessor_config.json").write_text('{"resample": 2}')
    return made / "tower"


@pytest.fixture(scope="module")
def tower(folder, tmp_path_factory):
    """(network, its parameters) of the imported folder."""
    base = tmp_path_factory.mktemp("base") / "siglip"
    done = run_import.run_import("siglip", folder, base)
    assert done.options["sizes"] == SMALL
    assert done.dropped and all(name.startswith("head.") for name in done.dropped)
    shapes = rules.flatten(base_description.base_about(base)["shapes"])
    assert shapes
    leaves = {p: np.asarray(x[...]) for p, x in checkpoint.open_leaves(base).items()}
    return siglip.SiglipVision(**SMALL), rules.unflatten(leaves)["vision_encoder"]


def run(model, params, pixels):
    values = jnp.moveaxis(jnp.asarray(pixels.detach().numpy()), 1, -1)
    return jax.jit(model.apply)({"params": params}, values)


def close(ours, expected, tolerance=1e-5):
    expected = np.asarray(expected.detach())
    np.testing.assert_allclose(ours, expected, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("size", [30, 48])
def test_features_are_those_of_transformers(peer, tower, size):
    """At the table's own size, with pixels that no patch takes, and at an interpolated one."""
    pixels = torch.randn(2, 3, size, size)
    with torch.no_grad():
        found = peer(pixels, output_hidden_states=True, interpolate_pos_encoding=size != 30)
    features, lengths = run(*tower, pixels)
    close(features, found.last_hidden_state)
    np.testing.assert_array_equal(lengths, [(size // 8) ** 2] * 2)
    assert tower[0].features_of(size) == (size // 8) ** 2
    for unused, state in ((0, -1), (1, -2)):
        model = tower[0].clone(final_norm=False, unused_blocks=unused)
        close(run(model, tower[1], pixels)[0], found.hidden_states[state])


def test_gradients_are_those_of_transformers(peer, tower):
    model, params = tower
    pixels, weights = torch.randn(1, 3, 30, 30, requires_grad=True), torch.randn(1, 9, 48)
    (peer(pixels).last_hidden_state * weights).sum().backward()

    def loss(params, values):
        return jnp.sum(model.apply({"params": params}, values)[0] * weights.numpy())

    values = jnp.moveaxis(jnp.asarray(pixels.detach().numpy()), 1, -1)
    ours, inputs = jax.jit(jax.grad(loss, (0, 1)))(params, values)
    close(jnp.moveaxis(inputs, -1, 1), pixels.grad)
    block = peer.encoder.layers[1]
    close(ours["layers"]["feed_forward"]["up"]["kernel"][1].T, block.mlp.fc1.weight.grad)
    close(
        ours["layers"]["attention"]["key"]["kernel"][1].reshape(48, 48).T,
        block.self_attn.k_proj.weight.grad,
    )
    close(ours["embeddings"]["positions"], peer.embeddings.position_embedding.weight.grad)


def test_scan_unroll_and_remat_agree_in_both_precisions(tower):
    model, params = tower
    pixels = torch.randn(1, 3, 30, 30)
    expected = np.asarray(run(model, params, pixels)[0])
    again = run(model.clone(unroll=3, remat="all"), params, pixels)[0]
    np.testing.assert_allclose(again, expected, atol=1e-5 * np.abs(expected).max())
    half = run(model.clone(dtype=jnp.bfloat16), params, pixels)[0]
    assert half.dtype == jnp.bfloat16
    assert np.abs(half.astype(np.float32) - expected).mean() < 0.03 * np.abs(expected).mean()


@pytest.mark.parametrize("size", [name for name in siglip.SIZES if name != "tiny"])
def test_published_sizes(size):
    """As many parameters as the torch class without its pooling head; each has a sharding row."""
    with torch.device("meta"):
        peer = SiglipVisionModel(config(siglip.SIZES[size], vision_use_head=False))
    model = siglip.SiglipVision(**siglip.SIZES[size])
    shapes = jax.eval_shape(model.init, jax.random.key(0), *model.example())["params"]
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert count == sum(p.numel() for p in peer.parameters())
    rules.assign(siglip.SHARDING, shapes, what="siglip.SHARDING")
    if size == "so400m_14_384":
        assert count == 412_987_248 and shapes["embeddings"]["positions"].shape == (729, 1152)


def test_a_folder_comes_in_and_goes_out(peer, folder, tmp_path):
    """Bit by bit, without the head, and with the file that tells how pictures are prepared."""
    run_import.run_import("siglip", folder, tmp_path / "base")
    run_export.run_export("siglip", tmp_path / "base", tmp_path / "out")
    back = files.open_checkpoint(tmp_path / "out")
    state = {n: x.numpy() for n, x in peer.state_dict().items() if not n.startswith("head.")}
    assert set(back) == state.keys()
    assert all(np.asarray(back[name]).tobytes() == x.tobytes() for name, x in state.items())
    assert json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())["resample"] == 2


def test_the_whole_of_siglip_gives_the_same_tower(peer, tower, tmp_path):
    """Published folders: both towers, and names that begin with 'vision_model.'."""
    text = SiglipTextConfig(
        vocab_size=30,
        hidden_size=48,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=2,
        projection_size=48,
    )
    towers = dict(text_config=text.to_dict(), vision_config=config(SMALL).to_dict())
    whole = SiglipModel(SiglipConfig(**towers))
    whole.vision_model.load_state_dict(peer.state_dict())
    whole.save_pretrained(tmp_path / "in")
    opened = files.open_checkpoint(tmp_path / "in")
    assert "vision_model.embeddings.patch_embedding.weight" in opened
    with pytest.raises(UserError, match="this looks like siglip, not clip_vision"):
        run_import.check_kind("clip_vision", opened)
    done = run_import.run_import("siglip", tmp_path / "in", tmp_path / "base")
    assert done.options == {"prefix": "vision_model.", "sizes": SMALL}
    made = checkpoint.open_leaves(tmp_path / "base")
    ours = rules.flatten({"vision_encoder": tower[1]})
    assert made.keys() == ours.keys()
    for path, leaf in ours.items():
        np.testing.assert_array_equal(made[path][...], leaf)


REFUSED = {
    "naflex": (dict(model_type="siglip2"), "model_type"),
    "another image size": (dict(image_size=48), "image_size"),
    "sides that differ": (dict(image_size=[30, 48]), "image_size"),
    "patch": (dict(patch_size=7), "patch_size"),
    "heads": (dict(num_attention_heads=5), "num_attention_heads"),
    "activation": (dict(hidden_act="gelu_of_mine"), "hidden_act"),
    "epsilon": (dict(layer_norm_eps=0), "layer_norm_eps"),
    "depth": (dict(num_hidden_layers=2), "num_hidden_layers"),
    "channels": (dict(num_channels=1), "num_channels"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_tower_is_not_is_refused_by_name(case, folder, tmp_path):
    changed, field = REFUSED[case]
    shutil.copytree(folder, tmp_path / "in")
    file = tmp_path / "in" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    with pytest.raises(UserError, match=rf"config\.json: {field}: "):
        run_import.examine("siglip", tmp_path / "in")


def test_another_activation_is_recorded(folder, tmp_path):
    """A stage that says nothing of it does not load the base."""
    shutil.copytree(folder, tmp_path / "in")
    file = tmp_path / "in" / "config.json"
    changed = {"hidden_act": "gelu", "layer_norm_eps": 1e-5}
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    run_import.run_import("siglip", tmp_path / "in", tmp_path / "base")
    made = siglip.SiglipVision(**SMALL)
    told = dict(activation="gelu", epsilon=1e-5)
    parameters.check_fields(
        {"vision_encoder": made.clone(**told)}, str(tmp_path / "base"), "vision_encoder"
    )
    with pytest.raises(UserError, match=r"fields\.(activation|epsilon)"):
        parameters.check_fields({"vision_encoder": made}, str(tmp_path / "base"), "vision_encoder")


def test_weights_without_config_need_a_size(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "in")
    (tmp_path / "in" / "config.json").unlink()
    with pytest.raises(UserError, match="do not tell the number of heads"):
        run_import.examine("siglip", tmp_path / "in")
    with pytest.raises(UserError, match="found 0"):
        table.options(files.open_checkpoint(_clip(tmp_path / "clip")), "")


def _clip(path):
    """A tower with a class token, which SigLIP's is not."""
    from safetensors.numpy import save_file

    path.mkdir()
    names = ("class_embedding", "position_embedding.weight", "patch_embedding.bias")
    tensors = {f"vision_model.embeddings.{name}": np.zeros(3, np.float32) for name in names}
    save_file(tensors, path / "model.safetensors")
    return path


@pytest.mark.parametrize("filter", ["bicubic", "bilinear"])
def test_pixels_are_those_of_transformers(filter, tmp_path):
    """`SiglipImageProcessor` without torchvision: a squashed square, from -1 to 1."""
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    peer = SiglipImageProcessorPil(
        size={"height": 30, "width": 30},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        resample={"bicubic": 3, "bilinear": 2}[filter],
    )
    expected = peer(Image.fromarray(pixels), return_tensors="np")["pixel_values"][0]
    options = {"size": 30, "normalization": "siglip", "resample": filter}
    ours = image.load(tmp_path / "a.png", options)
    np.testing.assert_allclose(np.moveaxis(ours, -1, 0), expected, atol=1e-6)
    assert ours.min() >= -1 and ours.max() <= 1
    with pytest.raises(UserError, match=r"data\.image\.normalization.*clip or siglip"):
        image.load(tmp_path / "a.png", options | {"normalization": "imagenet"})
