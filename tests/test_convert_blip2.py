"""A Hugging Face BLIP-2 folder with random weights: its numbers, its names, and the way back."""

from __future__ import annotations

import copy

import jax
import numpy as np
import pytest

from xllm_jax.convert import export_tree, files, import_tree, run_export, run_import
from xllm_jax.convert.sources import blip2
from xllm_jax.core.errors import UserError
from xllm_jax.models import interfaces, vit

torch = pytest.importorskip("torch")

WIDTH = vit.SIZES["tiny"]["width"]
VISION = vit.VisionTransformer(**vit.SIZES["tiny"])
# Hugging Face gives the norm behind the encoder the encoder's epsilon.
FIELDS = interfaces.SIZES["tiny"] | {"llm_width": 16, "norm_epsilon": VISION.epsilon}
INTERFACE = interfaces.QFormerInterface(**FIELDS)


@pytest.fixture(scope="module")
def peer():
    """transformers' model with an OPT behind it, every parameter shaken."""
    from transformers import Blip2Config, Blip2ForConditionalGeneration

    torch.manual_seed(0)
    config = Blip2Config(
        vision_config=dict(
            hidden_size=WIDTH, num_hidden_layers=VISION.depth, num_attention_heads=VISION.heads,
            image_size=VISION.image_size, patch_size=VISION.patch, intermediate_size=VISION.hidden,
        ),
        qformer_config=dict(
            hidden_size=INTERFACE.width, num_hidden_layers=INTERFACE.depth,
            num_attention_heads=INTERFACE.heads, intermediate_size=INTERFACE.hidden,
            encoder_hidden_size=WIDTH, cross_attention_frequency=2, vocab_size=50,
            max_position_embeddings=20,
        ),
        text_config=dict(
            model_type="opt", hidden_size=16, word_embed_proj_dim=16, num_hidden_layers=1,
            num_attention_heads=2, ffn_dim=16, vocab_size=20, max_position_embeddings=20,
        ),
        num_query_tokens=INTERFACE.queries,
    )  # fmt: skip
    model = Blip2ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
            if name.endswith("qkv.bias"):
                parameter[WIDTH : 2 * WIDTH] = 0  # as BLIP-2 builds it
    return model


OPTIONS = dict(
    kind="hf", text=False, adapter=True, vision=vit.SIZES["tiny"], interface=FIELDS
)  # fmt: skip


def read(source):
    """(tree of both parts, report)."""
    plan = blip2.plan(OPTIONS)
    return import_tree(plan.table, source, plan.shapes, drop=plan.drop, fresh=plan.fresh)


def test_equals_transformers(peer, tmp_path):
    """Image to LLM embeddings, read from a folder of shards with an index."""
    peer.save_pretrained(tmp_path, max_shard_size="400KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    tree, report = read(files.open_checkpoint(tmp_path))
    vision, interface = tree["vision_encoder"], tree["image_interface"]
    assert not report.fresh
    pixels = torch.randn(3, 3, VISION.image_size, VISION.image_size)
    with torch.no_grad():
        features = peer.vision_model(pixels).last_hidden_state
        queries = peer.query_tokens.expand(len(pixels), -1, -1)
        states = peer.qformer(query_embeds=queries, encoder_hidden_states=features)
        expected = peer.language_projection(states.last_hidden_state).numpy()

    @jax.jit
    def run(vision, interface, images):
        return INTERFACE.apply({"params": interface}, *VISION.apply({"params": vision}, images))

    embeddings, counts = run(vision, interface, pixels.permute(0, 2, 3, 1).numpy())
    np.testing.assert_array_equal(counts, [INTERFACE.queries] * 3)
    np.testing.assert_allclose(embeddings, expected, atol=1e-5 * np.abs(expected).max())


def test_every_tensor_is_used_once_and_comes_back(peer, tmp_path):
    """In float16, as BLIP-2 is published; only the other LLM stays behind."""
    half = copy.deepcopy(peer).half()
    half.save_pretrained(tmp_path)
    source = files.open_checkpoint(tmp_path)
    tree, report = read(source)
    left = source.keys() - report.used.keys()
    assert left and all(name.startswith("language_model.") for name in left)
    back = export_tree(blip2.plan(OPTIONS).table, tree)
    assert back.keys() == source.keys() - left
    for name, tensor in back.items():
        assert tensor.dtype == np.float16 and tensor.tobytes() == source[name].tobytes(), name
    state = {name: torch.from_numpy(x.copy()) for name, x in back.items()}
    assert not half.load_state_dict(state, strict=False).unexpected_keys


def test_the_command_takes_a_folder_there_and_back(peer, tmp_path):
    peer.save_pretrained(tmp_path / "blip2")
    run_import.run_import("blip2", tmp_path / "blip2", tmp_path / "base")
    run_export.run_export("blip2", tmp_path / "base", tmp_path / "back")
    source, back = (files.open_checkpoint(tmp_path / name) for name in ("blip2", "back"))
    assert set(back) == {name for name in source if not name.startswith("language_model.")}
    assert all(back[name].tobytes() == source[name].tobytes() for name in back)


@pytest.mark.parametrize(
    "name",
    [
        "query_tokens",
        "vision_model.post_layernorm.weight",
        "qformer.encoder.layer.2.crossattention.attention.key.weight",
        "language_projection.bias",
    ],
)
def test_a_folder_without_a_tensor_is_refused_by_name(name, peer):
    source = {key: x.numpy() for key, x in peer.state_dict().items() if key != name}
    with pytest.raises(UserError) as caught:
        read(source)
    assert caught.value.field == name
