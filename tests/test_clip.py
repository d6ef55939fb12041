"""CLIP against transformers, and by OpenAI's names, with random weights."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
import small_clip
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPImageProcessorPil, CLIPTokenizer

from xllm_jax.convert import export_tree, files, import_tree, run_export, run_import
from xllm_jax.convert.sources import clip as tables
from xllm_jax.core import base_description, rules
from xllm_jax.core.errors import UserError
from xllm_jax.evaluation import clip_base
from xllm_jax.models import clip, clip_text

torch = pytest.importorskip("torch")

CAPTIONS = ["red ball", "a dog, a ball and a man on the street", "", "球 <|endoftext|> red"]


@pytest.fixture(scope="module", params=[True, False], ids=["old", "new"])
def peer(request, tmp_path_factory):
    """(transformers' model, its folder)."""
    folder = tmp_path_factory.mktemp("clip")
    return small_clip.write(folder, request.param), folder


def load(path):
    """(network, parameters, plan, report) of a folder."""
    opened = files.open_checkpoint(path)
    assert tables.recognize(opened)
    options = json.loads(json.dumps(tables.options(opened, "")))
    plan = tables.plan(options)
    tree, report = import_tree(plan.table, opened, plan.shapes, drop=plan.drop)
    assert not report.fresh
    return clip.Clip(**options["sizes"]), tree[tables.PART], plan, report


def close(ours, expected):
    expected = expected.detach().numpy()
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * max(1, np.abs(expected).max()))


def inputs(folder):
    """(pixels `[4, 3, side, side]`, ids `[4, tokens]`) of torch."""
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    ids = tokenizer(CAPTIONS, padding="max_length", truncation=True, return_tensors="pt")
    torch.manual_seed(4)
    return torch.randn(4, 3, small_clip.SIDE, small_clip.SIDE), ids["input_ids"]


def test_equals_transformers(peer):
    model, folder = peer
    ours, params, _, report = load(folder)
    assert set(report.dropped) == {"logit_scale"}
    pixels, ids = inputs(folder)
    values = np.moveaxis(pixels.numpy(), 1, -1)
    apply = jax.jit(lambda params, *a: ours.apply({"params": params}, *a, method=run))
    made = apply(params, values, ids.numpy())
    with torch.no_grad():
        found = model(input_ids=ids, pixel_values=pixels)
        close(made["texts"], model.get_text_features(input_ids=ids).pooler_output)
        close(made["images"], model.get_image_features(pixel_values=pixels).pooler_output)
        close(made["cosines"], (found.image_embeds * found.text_embeds).sum(-1))
    assert np.ptp(made["cosines"]) > 0.1


def run(module, values, ids):
    return {
        "texts": module.texts(ids),
        "images": module.images(values),
        "cosines": module(values, ids),
    }


def test_where_a_text_ends():
    ids = np.array([[7, 9, 3, 9], [1, 2, 3, 4]])
    np.testing.assert_array_equal(clip_text.ends(ids, 9), [1, 0])
    np.testing.assert_array_equal(clip_text.ends(ids, 3), [2, 2])
    np.testing.assert_array_equal(clip_text.ends(ids, None), [1, 3])


def test_the_command_takes_a_folder_there_and_back(peer, tmp_path):
    _, folder = peer
    done = run_import.run_import("clip", folder, tmp_path / "base")
    run_export.run_export("clip", tmp_path / "base", tmp_path / "back")
    old, back = (files.open_checkpoint(path) for path in (folder, tmp_path / "back"))
    assert set(back) == set(old) - {"logit_scale"} and list(done.dropped) == ["logit_scale"]
    assert all(back[name].tobytes() == old[name].tobytes() for name in back)
    assert {f.name for f in (tmp_path / "back").iterdir()} >= {"tokenizer.json"}
    assert base_description.base_origin(tmp_path / "base").startswith(
        "converted from clip: model.safe"
    )


def original(model):
    """The state of a model under the original names."""
    state, made = {n: x.detach() for n, x in model.state_dict().items()}, {}
    names = {"visual_projection.weight": "visual.proj", "text_projection.weight": "text_projection"}
    for name, new in names.items():
        made[new] = state.pop(name).T.contiguous()
    for layer in range(2):
        for tower in ("vision_model.", "text_model."):
            old = f"{tower}encoder.layers.{layer}."
            for kind in ("weight", "bias"):
                parts = [state.pop(f"{old}self_attn.{letter}_proj.{kind}") for letter in "qkv"]
                made[f"{old}attn.in_proj_{kind}"] = torch.cat(parts)
    made |= state
    renamed = (
        ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
        ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
        ("vision_model.embeddings.patch_embedding", "visual.conv1"),
        ("vision_model.pre_layrnorm", "visual.ln_pre"),
        ("vision_model.post_layernorm", "visual.ln_post"),
        ("vision_model.encoder.layers", "visual.transformer.resblocks"),
        ("text_model.embeddings.token_embedding", "token_embedding"),
        ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
        ("text_model.encoder.layers", "transformer.resblocks"),
        ("text_model.final_layer_norm", "ln_final"),
        ("self_attn.out_proj", "attn.out_proj"),
        ("layer_norm", "ln_"),
        ("mlp.fc1", "mlp.c_fc"),
        ("mlp.fc2", "mlp.c_proj"),
    )
    for old, new in renamed:
        made = {name.replace(old, new): x for name, x in made.items()}
    return made


@pytest.mark.parametrize("peer", [True], indirect=True)
def test_the_original_names_give_the_same_parameters(peer, tmp_path):
    model, folder = peer
    _, expected, _, _ = load(folder)
    source = original(model) | {"input_resolution": torch.tensor(32)}
    save_file(source, str(tmp_path / "model.safetensors"))
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())  # tells heads
    ours, params, plan, report = load(tmp_path)
    assert ours.text_fields["end"] is None
    assert set(report.dropped) == {"logit_scale", "input_resolution"}
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    back = export_tree(plan.table, {tables.PART: params})
    assert all(back[name].tobytes() == source[name].numpy().tobytes() for name in back)


@pytest.mark.parametrize("peer", [False], indirect=True)
def test_other_files_and_sizes_are_refused_by_name(peer, tmp_path):
    _, folder = peer
    opened = files.open_checkpoint(folder)
    with pytest.raises(UserError, match="unknown size"):
        tables.options(opened, "huge")
    state = {name: torch.tensor(opened[name]) for name in opened}
    del state["text_model.final_layer_norm.weight"]
    save_file(state, str(tmp_path / "model.safetensors"))
    assert not tables.recognize(files.open_checkpoint(tmp_path))
    with pytest.raises(UserError, match="this looks like clip_vision, not clip"):
        run_import.run_import("clip", tmp_path, tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["hidden_act"] = "gelu"
    state["text_model.final_layer_norm.weight"] = torch.ones(32)
    save_file(state, str(tmp_path / "model.safetensors"))
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="text_config has the activation 'gelu'"):
        run_import.run_import("clip", tmp_path, tmp_path / "base")


def test_published_size():
    """As many parameters as transformers counts for ViT-B/16; each has a sharding row."""
    from transformers import CLIPConfig, CLIPModel

    vision = dict(patch_size=16)  # all else is what CLIPConfig supposes
    with torch.device("meta"):
        peer = CLIPModel(CLIPConfig(text_config={}, vision_config=vision))
    model = clip.Clip(**clip.SIZES["clip_vit_b_16"])
    shapes = jax.eval_shape(model.init, jax.random.key(0), *model.example())["params"]
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert count + 1 == sum(p.numel() for p in peer.parameters()) == 149_620_737
    rules.assign(clip.SHARDING, shapes, what="clip.SHARDING", total=False)
    assert tables.plan(tables.options(None, "tiny")).shapes["clip"]["text"]["layers"]


@pytest.mark.parametrize("peer", [False], indirect=True)
def test_features_for_scores_equal_transformers(peer, tmp_path):
    model, folder = peer
    run_import.run_import("clip", folder, tmp_path / "base")
    base = clip_base.ClipBase(str(tmp_path / "base"))
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (5, small_clip.SIDE + 8, small_clip.SIDE, 3)).astype(np.uint8)
    prepared = CLIPImageProcessorPil.from_pretrained(folder)(
        [Image.fromarray(one) for one in pictures], return_tensors="pt"
    )
    _, ids = inputs(folder)
    with torch.no_grad():
        close(base.images(pictures, batch=3), model.get_image_features(**prepared).pooler_output)
        close(base.texts(CAPTIONS), model.get_text_features(input_ids=ids).pooler_output)
