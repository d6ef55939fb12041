"""CLIP's vision tower against transformers and against the original names, with random weights."""

from __future__ import annotations

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.torch import save_file

from xllm_jax.convert import export_tree, files, import_tree, run_export, run_import
from xllm_jax.convert.sources import clip_vision as tables
from xllm_jax.convert.torchscript import TorchScriptFile
from xllm_jax.core import rules
from xllm_jax.core.errors import UserError
from xllm_jax.models import clip_vision

torch = pytest.importorskip("torch")

SMALL = dict(image_size=32, patch=8, width=48, depth=3, heads=4, hidden=80)


def peer_config(sizes: dict):
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(
        hidden_size=sizes["width"],
        intermediate_size=sizes["hidden"],
        num_hidden_layers=sizes["depth"],
        num_attention_heads=sizes["heads"],
        image_size=sizes["image_size"],
        patch_size=sizes["patch"],
    )


def shake(module, seed: int = 0):
    """Adds noise to every parameter, so that norms and biases matter too."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module.eval()


@pytest.fixture(scope="module")
def peer():
    from transformers import CLIPVisionModel

    torch.manual_seed(0)
    return shake(CLIPVisionModel(peer_config(SMALL)))


def load(path, **fields):
    """(network, parameters, plan, report) of a folder, or a file, which does not tell heads."""
    checkpoint = files.open_checkpoint(path)
    assert tables.recognize(checkpoint)
    options = json.loads(json.dumps(tables.options(checkpoint, "")))
    assert options["sizes"] == SMALL | ({} if path.is_dir() else {"heads": 1})
    plan = tables.plan(options | {"sizes": SMALL})
    tree, report = import_tree(plan.table, checkpoint, plan.shapes, drop=plan.drop)
    assert not report.fresh
    return clip_vision.ClipVision(**SMALL, **fields), tree[tables.PART], plan, report


def write(source, path):
    save_file({name: torch.as_tensor(x).contiguous() for name, x in source.items()}, str(path))
    return path


def run(model, params, pixels):
    values = jnp.moveaxis(jnp.asarray(pixels.numpy()), 1, -1)
    return jax.jit(model.apply)({"params": params}, values)


def close(ours, expected):
    expected = expected.numpy()
    np.testing.assert_allclose(ours, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("size", [32, 48])
def test_equals_transformers(peer, size, tmp_path):
    """From a saved folder, at the table's own size and at an interpolated one."""
    peer.save_pretrained(tmp_path)
    model, params, _, report = load(tmp_path)
    assert not report.dropped
    pixels = torch.randn(2, 3, size, size)
    with torch.no_grad():
        options = dict(interpolate_pos_encoding=size != 32, output_hidden_states=True)
        expected = peer(pixels, **options)
        behind = peer.post_layernorm(expected.last_hidden_state)
    features, lengths = run(model, params, pixels)
    close(features, behind)
    close(features[:, 0], expected.pooler_output)
    np.testing.assert_array_equal(lengths, [1 + (size // 8) ** 2] * 2)
    states, _ = run(model.clone(final_norm=False), params, pixels)
    close(states, expected.last_hidden_state)
    before, _ = run(model.clone(final_norm=False, unused_blocks=1), params, pixels)
    close(before, expected.hidden_states[-2])  # which LLaVA reads
    assert model.features_of(size) == features.shape[1]


def test_the_whole_of_clip_gives_the_same_tower(peer, tmp_path):
    """The published names ('vision_model.') and everything that is no part of the tower."""
    source = {f"vision_model.{name}": x.numpy() for name, x in peer.state_dict().items()}
    _, alone, _, _ = load(write(peer.state_dict(), tmp_path / "tower.safetensors"))
    others = ("logit_scale", "visual_projection.weight", "text_projection.weight")
    others += ("text_model.encoder.layers.0.mlp.fc1.bias", "vision_model.embeddings.position_ids")
    whole = write(source | {name: np.ones(3) for name in others}, tmp_path / "whole.safetensors")
    _, params, plan, report = load(whole)
    assert report.dropped.keys() == set(others)
    jax.tree.map(np.testing.assert_array_equal, params, alone)
    back = export_tree(plan.table, {tables.PART: params})
    assert back.keys() == source.keys()
    assert all(back[name].tobytes() == source[name].tobytes() for name in source)


def test_the_command_takes_a_folder_there_and_back(peer, tmp_path):
    peer.save_pretrained(tmp_path / "clip")
    run_import.run_import("clip_vision", tmp_path / "clip", tmp_path / "base")
    run_export.run_export("clip_vision", tmp_path / "base", tmp_path / "back")
    back = files.open_checkpoint(tmp_path / "back")
    state = peer.state_dict()
    assert set(back) == state.keys()
    assert all(back[name].tobytes() == x.numpy().tobytes() for name, x in state.items())


class OpenAIBlock(torch.nn.Module):
    """A block of the original code: torch's own attention, names included."""

    def __init__(self, width, heads, hidden):
        super().__init__()
        self.attn = torch.nn.MultiheadAttention(width, heads)
        self.ln_1, self.ln_2 = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.mlp = torch.nn.ModuleDict(
            {"c_fc": torch.nn.Linear(width, hidden), "c_proj": torch.nn.Linear(hidden, width)}
        )

    def forward(self, x):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        y = self.mlp["c_fc"](self.ln_2(x))
        return x + self.mlp["c_proj"](y * torch.sigmoid(1.702 * y))


class OpenAITower(torch.nn.Module):
    """The original vision tower, the projection behind it included."""

    def __init__(self, sizes):
        super().__init__()
        width, patch = sizes["width"], sizes["patch"]
        self.class_embedding = torch.nn.Parameter(torch.randn(width))
        patches = (sizes["image_size"] // patch) ** 2
        self.positional_embedding = torch.nn.Parameter(torch.randn(patches + 1, width))
        self.proj = torch.nn.Parameter(torch.randn(width, 16))
        self.conv1 = torch.nn.Conv2d(3, width, patch, patch, bias=False)
        self.ln_pre, self.ln_post = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        blocks = [
            OpenAIBlock(width, sizes["heads"], sizes["hidden"]) for _ in range(sizes["depth"])
        ]
        self.transformer = torch.nn.ModuleDict({"resblocks": torch.nn.Sequential(*blocks)})

    def forward(self, pixels):
        x = self.conv1(pixels).flatten(2).permute(0, 2, 1)
        token = self.class_embedding.expand(x.shape[0], 1, -1)
        x = self.ln_pre(torch.cat([token, x], dim=1) + self.positional_embedding)
        x = self.transformer["resblocks"](x.permute(1, 0, 2)).permute(1, 0, 2)
        return self.ln_post(x)


class OpenAICLIP(torch.nn.Module):
    """The tower in its place, with some of what the published archive holds besides."""

    def __init__(self, sizes):
        super().__init__()
        self.visual = OpenAITower(sizes)
        self.transformer = torch.nn.Linear(3, 3)
        self.logit_scale = torch.nn.Parameter(torch.ones([]))
        self.register_buffer("vocab_size", torch.tensor(49408))

    def forward(self, pixels):
        return self.visual(pixels)


OTHERS = {"visual.proj", "transformer.weight", "transformer.bias", "logit_scale", "vocab_size"}


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """(folder with ViT-B-16.pt, a TorchScript archive as OpenAI's is; pixels; expected output)."""
    torch.manual_seed(2)
    whole, pixels = shake(OpenAICLIP(SMALL)).half().float(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = whole(pixels)
    folder = tmp_path_factory.mktemp("openai")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing finds branches; the archive is never run here
        torch.jit.save(torch.jit.trace(whole, pixels, check_trace=False), folder / "ViT-B-16.pt")
    heads = {"num_attention_heads": SMALL["heads"]}
    (folder / "config.json").write_text(json.dumps({"vision_config": heads}))
    return folder, pixels, expected


def test_equals_the_original_archive(archive):
    folder, pixels, expected = archive
    source = TorchScriptFile(folder / "ViT-B-16.pt")
    model, params, plan, report = load(folder)
    assert report.dropped.keys() == OTHERS
    close(run(model, params, pixels)[0], expected)
    back = export_tree(plan.table, {tables.PART: params})
    assert back.keys() == source.keys() - OTHERS
    assert all(back[name].tobytes() == source[name].tobytes() for name in back)


@pytest.mark.parametrize("file", ["", "ViT-B-16.pt"])
def test_the_command_takes_the_archive_there_and_back(archive, file, tmp_path):
    folder = archive[0]
    done = run_import.run_import("clip_vision", folder / file, tmp_path / "base")
    assert done.options["sizes"] == SMALL and done.dropped.keys() == OTHERS
    assert [entry["name"] for entry in done.files] == ["ViT-B-16.pt"]
    run_export.run_export("clip_vision", tmp_path / "base", tmp_path / "back")
    back, source = (files.open_checkpoint(p) for p in (tmp_path / "back", folder))
    assert set(back) == source.keys() - OTHERS
    assert all(back[name].tobytes() == source[name].tobytes() for name in back)


@pytest.mark.parametrize(("head_width", "heads"), [(12, 4), (16, 3), (None, 0)])
def test_heads_of_open_clip_are_those_of_its_config(archive, head_width, heads, tmp_path):
    """Its larger models have heads of 80; its own activation is no quick GELU."""
    source = TorchScriptFile(archive[0] / "ViT-B-16.pt")
    state = {name: np.array(source[name]) for name in source}
    write(state, tmp_path / "open_clip_model.safetensors")
    tower = dict(width=48, layers=3, patch_size=8, image_size=32)
    tower |= {"head_width": head_width} if head_width else {}
    config = dict(vision_cfg=tower, text_cfg=dict(width=32, layers=2, heads=4), quick_gelu=True)
    file = tmp_path / "open_clip_config.json"
    file.write_text(json.dumps(dict(model_cfg=config)))
    opened = files.open_checkpoint(tmp_path)
    if not heads:  # 64 wide, as open_clip supposes, which 48 is not
        with pytest.raises(UserError, match=r"open_clip_config\.json.*num_attention_heads"):
            tables.options(opened, "")
        return
    assert tables.options(opened, "")["sizes"] == SMALL | {"heads": heads}
    file.write_text(json.dumps(dict(model_cfg=config | dict(quick_gelu=False))))
    with pytest.raises(UserError, match=r"open_clip_config\.json.*activation 'gelu'"):
        tables.options(opened, "")
    file.write_text("{}")
    with pytest.raises(UserError, match="no configuration of open_clip"):
        tables.options(opened, "")


def test_other_files_and_sizes_are_refused_by_name(peer, tmp_path):
    state = dict(peer.state_dict())
    checkpoint = files.open_checkpoint(write(state, tmp_path / "tower.safetensors"))
    with pytest.raises(UserError, match="unknown size"):
        tables.options(checkpoint, "huge")
    plan = tables.plan(tables.options(checkpoint, "tiny"))
    with pytest.raises(UserError, match="needs"):
        import_tree(plan.table, checkpoint, plan.shapes, drop=plan.drop)
    name = "encoder.layers.1.self_attn.k_proj.bias"
    del state[name]
    with pytest.raises(UserError, match="no such tensor") as caught:
        load(write(state, tmp_path / "short.safetensors"))
    assert caught.value.field.endswith(name)
    eva = {"vision_model.embeddings.class_embedding": torch.zeros(1, 1, 3)}  # BLIP-2's is another
    checkpoint = files.open_checkpoint(write(eva, tmp_path / "eva.safetensors"))
    assert not tables.recognize(checkpoint)
    with pytest.raises(UserError, match="found 0"):
        tables.options(checkpoint, "")
    ours = tables.plan(tables.options(None, ""))
    assert ours.table[0].source == "vision_model.embeddings.class_embedding"


def test_scan_unroll_and_remat_agree_in_both_precisions(peer, tmp_path):
    pixels = torch.randn(1, 3, 32, 32)
    model, params, _, _ = load(write(peer.state_dict(), tmp_path / "tower.safetensors"))
    expected = np.asarray(run(model, params, pixels)[0])
    again = run(model.clone(unroll=3, remat="all"), params, pixels)[0]
    np.testing.assert_allclose(again, expected, atol=1e-5 * np.abs(expected).max())
    half = run(model.clone(dtype=jnp.bfloat16), params, pixels)[0]
    assert half.dtype == jnp.bfloat16
    assert np.abs(half.astype(np.float32) - expected).mean() < 0.03 * np.abs(expected).mean()


@pytest.mark.parametrize(
    ("size", "published"),
    [
        ("clip_vit_b_16", 85_799_424),
        ("clip_vit_l_14", 303_179_776),
        ("clip_vit_l_14_336", 303_507_456),
    ],
)
def test_published_sizes(size, published):
    """As many parameters as transformers counts; each has a sharding row."""
    from transformers import CLIPVisionModel

    with torch.device("meta"):
        peer = CLIPVisionModel(peer_config(clip_vision.SIZES[size]))
    model = clip_vision.ClipVision(**clip_vision.SIZES[size])
    shapes = jax.eval_shape(model.init, jax.random.key(0), *model.example())["params"]
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert count == sum(p.numel() for p in peer.parameters()) == published
    rules.assign(clip_vision.SHARDING, shapes, what="clip_vision.SHARDING", total=False)
