"""Folders of Stable Diffusion in every form that diffusers writes, both ways; what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import published
import pytest
from conftest import GOLDEN
from test_convert_command import leaves_of, same, shapes_are_traced_once  # noqa: F401

from xllm_jax.convert import conversion_record, files, run_export, run_import
from xllm_jax.core import base_description
from xllm_jax.core.errors import UserError

SOURCE = "stable_diffusion"
RECORDED = GOLDEN / "diffusion" / "sd"


def config(part):
    """Sizes of a part of the recorded pipeline."""
    return json.loads((RECORDED / part / "config.json").read_text())


def row_of(told):
    """A row of SIZES."""
    return dict(channels=tuple(told["block_out_channels"]), groups=told["norm_num_groups"])


WEIGHTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
TODAY = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@pytest.fixture
def folder(tmp_path):
    """A copy of the recorded pipeline that may be changed."""
    shutil.copytree(RECORDED, tmp_path / "sd")
    return tmp_path / "sd"


def tensors_of(folder, part):
    return dict(files.open_checkpoint(folder / part))


def write(folder, part, tensors, name):
    """Puts tensors into a part's folder under a file's name; what was there goes."""
    for old in (folder / part).glob("*.safetensors"):
        old.unlink()
    path = folder / part / name
    return (published.write_torch if name.endswith(".bin") else published.write_safetensors)(
        tensors, path
    )


def base_of(path, tmp_path, name="base"):
    run_import.run_import(SOURCE, path, tmp_path / name)
    return leaves_of(tmp_path / name)


def edit(file: Path, **changes):
    """Changes fields of a JSON file; None removes one."""
    told = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in told.items() if value is not None}))


def test_a_folder_comes_in_and_goes_out_bit_by_bit(folder, tmp_path):
    held = base_of(folder, tmp_path)
    assert {path.partition("/")[0] for path in held} == set(WEIGHTS)
    made = conversion_record.read(tmp_path / "base")
    assert set(made.dropped) == {"text_encoder.text_model.embeddings.position_ids"}
    assert [one["name"] for one in made.files] == [
        f"{part}/{name}.safetensors" for part, name in WEIGHTS.items()
    ]
    names = run_export.run_export(SOURCE, tmp_path / "base", tmp_path / "out")
    assert names == [f"{part}/{name}.safetensors" for part, name in WEIGHTS.items()]
    for part in WEIGHTS:
        before, after = tensors_of(folder, part), tensors_of(tmp_path / "out", part)
        before.pop("text_model.embeddings.position_ids", None)
        assert before.keys() == after.keys()
        assert all(same(before[name], after[name]) for name in before)
    for path in folder.rglob("*"):
        copy = tmp_path / "out" / path.relative_to(folder)
        if path.is_file() and path.suffix != ".safetensors" and path.name != "model_index.json":
            assert copy.read_bytes() == path.read_bytes()
    index, old = (
        json.loads((f / "model_index.json").read_text()) for f in (tmp_path / "out", folder)
    )
    for part in (*WEIGHTS, "scheduler", "tokenizer", "_class_name"):
        assert index[part] == old[part]
    again = base_of(tmp_path / "out", tmp_path, "again")
    assert all(same(again[path], held[path]) for path in held)


def test_many_blocks_and_shards_give_the_same_tensors(folder, tmp_path, monkeypatch):
    """No tensor is ever whole in memory on its way in; on its way out they fill several files."""
    held = base_of(folder, tmp_path)
    monkeypatch.setattr(run_import, "BLOCK", 20_000)
    monkeypatch.setattr(run_export, "SHARD", 60_000)
    again = base_of(folder, tmp_path, "blocks")
    assert all(same(again[path], held[path]) for path in held)
    names = run_export.run_export(SOURCE, tmp_path / "blocks", tmp_path / "out")
    for part in WEIGHTS:
        assert sum(name.startswith(f"{part}/") for name in names) > 2
        assert len(list((tmp_path / "out" / part).glob("*.index.json"))) == 1
    shards = base_of(tmp_path / "out", tmp_path, "shards")
    assert shards.keys() == held.keys()
    assert all(same(shards[path], held[path]) for path in held)


def test_each_form_of_the_weights_gives_the_same_base(folder, tmp_path):
    """Names of today, .bin, variants, shards with an index, prefixes: the tensors decide."""
    held = base_of(folder, tmp_path)
    vae = tensors_of(folder, "vae")
    renamed = {
        ".".join(TODAY.get(word, word) for word in name.split(".")): x for name, x in vae.items()
    }
    assert renamed.keys() != vae.keys()
    write(folder, "vae", renamed, "diffusion_pytorch_model.bin")
    text = tensors_of(folder, "text_encoder")
    bare = {name.removeprefix("text_model."): x for name, x in text.items()}
    write(folder, "text_encoder", bare, "pytorch_model.bin")
    unet = tensors_of(folder, "unet")
    names = list(unet)
    write(folder, "unet", {}, "empty.safetensors").unlink()
    places = {}
    for number in (1, 2):
        file = f"diffusion_pytorch_model.fp16-{number:05d}-of-00002.safetensors"
        chosen = {name: unet[name] for name in names[number - 1 :: 2]}
        published.write_safetensors(chosen, folder / "unet" / file)
        places |= dict.fromkeys(chosen, file)
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.fp16.json"
    index.write_text(json.dumps({"weight_map": places}))
    other = base_of(folder, tmp_path, "other")
    assert other.keys() == held.keys()
    assert all(same(other[path], held[path]) for path in held)
    run_export.run_export(SOURCE, tmp_path / "other", tmp_path / "out")
    assert tensors_of(tmp_path / "out", "vae").keys() == renamed.keys()
    assert tensors_of(tmp_path / "out", "text_encoder").keys() == bare.keys() - {
        "embeddings.position_ids"
    }


def test_half_precision_stays_and_gives_way_to_whole(folder, tmp_path):
    """fp16 files are taken as they are; where float32 lies beside them, it is taken."""
    whole = tensors_of(folder, "vae")
    half = {name: x.astype(np.float16) for name, x in whole.items()}
    published.write_safetensors(half, folder / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    published.write_torch(half, folder / "vae" / "diffusion_pytorch_model.non_ema.bin")
    opened = files.open_checkpoint(folder / "vae")
    assert [path.name for path in opened.files] == ["diffusion_pytorch_model.safetensors"]
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    held = base_of(folder / "vae", tmp_path)
    assert {leaf.dtype for leaf in held.values()} == {np.dtype(np.float16)}
    run_export.run_export(SOURCE, tmp_path / "base", tmp_path / "out")
    again = tensors_of(tmp_path / "out", "vae")
    assert all(same(again[name], half[name]) for name in half)
    assert (tmp_path / "out/vae/config.json").read_bytes() == (
        folder / "vae/config.json"
    ).read_bytes()
    assert not (tmp_path / "out/model_index.json").exists()


def test_a_base_without_a_record_tells_its_sizes(folder, tmp_path):
    """As a run's result is: names of today, configurations made from the parameters."""
    held = base_of(folder, tmp_path)
    base = tmp_path / "base"
    (base / "conversion.json").unlink()
    for path in (*base.glob("*/config.json"), *base.glob("scheduler/*")):
        path.unlink()
    with pytest.MonkeyPatch.context() as patch:
        sizes = [
            (getattr(run_import.source_named(SOURCE), part), row_of(config(part)))
            for part in ("unet", "vae")
        ]
        for module, row in sizes:
            patch.setattr(module, "SIZES", {"mine": row})
        run_export.run_export(SOURCE, base, tmp_path / "out")
    made = json.loads((tmp_path / "out/unet/config.json").read_text())
    told = json.loads((RECORDED / "unet/config.json").read_text())
    assert all(told[key] == value for key, value in made.items() if key in told)
    assert len(made.keys() & told.keys()) > 8
    again = base_of(tmp_path / "out", tmp_path, "again")
    assert all(same(again[path], held[path]) for path in held)


def test_the_base_knows_what_no_shape_shows(folder, tmp_path):
    edit(folder / "vae/config.json", scaling_factor=0.5)
    base_of(folder, tmp_path)
    fields = {part: base_description.base_fields(tmp_path / "base", part) for part in WEIGHTS}
    assert fields["vae"] == {"groups": config("vae")["norm_num_groups"], "scaling": 0.5}
    wanted = {"groups": config("unet")["norm_num_groups"], "epsilon": config("unet")["norm_eps"]}
    assert fields["unet"] == wanted
    assert fields["text_encoder"]["activation"] == "quick_gelu"


NET = config("unet")
CHANNELS, HEADS = NET["block_out_channels"], NET["attention_head_dim"]
LEVELS, INDIVISIBLE = len(CHANNELS), max(CHANNELS) + 1  # parts of channels, which there are not
UNET = [
    ("attention_head_dim", INDIVISIBLE),
    ("attention_head_dim", [HEADS] * (LEVELS - 1)),
    ("attention_head_dim", str(HEADS)),
    ("block_out_channels", [*CHANNELS[:-1], 2 * CHANNELS[-1]]),
    ("down_block_types", ["DownBlock2D"] * LEVELS),
    ("up_block_types", ["CrossAttnUpBlock2D"] * LEVELS),
    ("layers_per_block", 1000000000),
    ("cross_attention_dim", NET["cross_attention_dim"] + 1),
    ("norm_num_groups", INDIVISIBLE),
    ("norm_eps", 0),
    ("act_fn", "gelu"),
    ("class_embed_type", "simple_projection"),
    ("time_embedding_dim", 4 * CHANNELS[0] - 1),
    ("transformer_layers_per_block", [1, 2, *[1] * (LEVELS - 2)]),
    ("dual_cross_attention", True),
    ("only_cross_attention", True),
    ("resnet_time_scale_shift", "scale_shift"),
    ("freq_shift", 1),
    ("flip_sin_to_cos", False),
    ("downsample_padding", 0),
    ("mid_block_type", "UNetMidBlock2DSimpleCrossAttn"),
    ("_class_name", "UNet3DConditionModel"),
]
VAE = [
    ("scaling_factor", -1),
    ("shift_factor", 0.1),
    ("latent_channels", config("vae")["latent_channels"] + 1),
    ("up_block_types", ["AttnUpDecoderBlock2D"] * 3),
    ("use_quant_conv", False),
    ("norm_num_groups", max(config("vae")["block_out_channels"]) + 1),
    ("out_channels", 1),
]


@pytest.mark.parametrize(
    ("part", "field", "value"), [("unet", *x) for x in UNET] + [("vae", *x) for x in VAE]
)
def test_what_no_network_here_computes_is_refused_by_its_field(
    folder, tmp_path, part, field, value
):
    edit(folder / part / "config.json", **{field: value})
    with pytest.raises(UserError) as caught:
        run_import.examine(SOURCE, folder)
    assert caught.value.field == f"{folder / part / 'config.json'}: {field}"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("attention_head_dim", [HEADS] * LEVELS),
        ("layers_per_block", [NET["layers_per_block"]] * LEVELS),
        ("upcast_attention", True),
        ("sample_size", 2 * NET["sample_size"]),
        ("time_embedding_dim", 4 * CHANNELS[0]),
        ("only_cross_attention", [False] * LEVELS),
        ("use_ema_warmup", True),
    ],
)
def test_other_words_for_the_same_are_taken(folder, field, value):
    edit(folder / "unet/config.json", **{field: value})
    run_import.examine(SOURCE, folder)


def test_linear_projections_come_back_as_they_were(folder, tmp_path):
    """As of 2.x: the same numbers in a matrix."""
    unet = tensors_of(folder, "unet")
    flat = {
        name: x[:, :, 0, 0] if ".proj_" in name and x.ndim == 4 else x for name, x in unet.items()
    }
    held = base_of(folder / "unet", tmp_path)
    write(folder, "unet", flat, "diffusion_pytorch_model.safetensors")
    edit(folder / "unet/config.json", use_linear_projection=True)
    other = base_of(folder / "unet", tmp_path, "other")
    assert all(same(other[path], held[path]) for path in held)
    run_export.run_export(SOURCE, tmp_path / "other", tmp_path / "out")
    again = tensors_of(tmp_path / "out", "unet")
    assert all(same(again[name], flat[name]) for name in flat)


def missing_folder(folder):
    shutil.rmtree(folder / "vae")
    return folder / "vae"


def missing_weights(folder):
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    return folder / "unet"


def cut_weights(folder):
    file = folder / "vae/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    return file


def two_text_encoders(folder):
    edit(folder / "model_index.json", text_encoder_2=["transformers", "CLIPTextModel"])
    return f"{folder / 'model_index.json'}: text_encoder_2"


def another_network(folder):
    edit(folder / "model_index.json", unet=["diffusers", "UNet3DConditionModel"])
    return f"{folder / 'model_index.json'}: unet"


def no_index(folder):
    (folder / "model_index.json").write_text("[]")
    return folder / "model_index.json"


def a_path_for_a_name(folder):
    """Names of an index lead to no file but the known ones."""
    edit(folder / "model_index.json", **{"../../secret": ["diffusers", "AutoencoderKL"]})
    return f"{folder / 'model_index.json'}: ../../secret"


def another_tensor(folder):
    unet = tensors_of(folder, "unet")
    unet["add_embedding.linear_1.weight"] = unet["conv_in.weight"]
    return f"{write(folder, 'unet', unet, 'model.safetensors')}: add_embedding.linear_1.weight"


def a_missing_tensor(folder):
    unet = tensors_of(folder, "unet")
    del unet["up_blocks.1.resnets.1.conv2.bias"]
    write(folder, "unet", unet, "model.safetensors")
    return "up_blocks.1.resnets.1.conv2.bias"


def a_level_far_away(folder):
    """A number in a name is no reason to count up to it."""
    unet = tensors_of(folder, "unet")
    name = "down_blocks.999999999999.resnets.0.conv1.weight"
    unet[name] = unet["conv_in.weight"]
    return f"{write(folder, 'unet', unet, 'model.safetensors')}: {name}"


@pytest.mark.parametrize(
    "damage",
    [
        missing_folder, missing_weights, cut_weights, two_text_encoders, another_network, no_index,
        a_path_for_a_name, another_tensor, a_missing_tensor, a_level_far_away,
    ],
)  # fmt: skip
def test_damage_is_told_in_one_line(folder, tmp_path, damage):
    place = str(damage(folder))
    with pytest.raises(UserError) as caught:
        run_import.run_import(SOURCE, folder, tmp_path / "base")
    assert place in caught.value.field and "\n" not in str(caught.value)
    assert not (tmp_path / "base").exists()


def test_weights_alone_need_a_size(folder, tmp_path):
    path = shutil.copy(
        folder / "unet/diffusion_pytorch_model.safetensors", tmp_path / "x.safetensors"
    )
    with pytest.raises(UserError, match="do not tell the number of heads"):
        run_import.examine(SOURCE, path)
    with pytest.raises(UserError, match="has channels"):
        run_import.examine(SOURCE, path, "stable_diffusion_2_1")
