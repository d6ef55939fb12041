"""launch/convert.py: every source both ways, what is refused, and what is left behind."""

from __future__ import annotations

import contextlib
import json
import pickle
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import forked
import jax
import ml_dtypes
import numpy as np
import published
import pytest
import torch

from xllm_jax.assembly import parameters
from xllm_jax.convert import files, run_export, run_import, sizes
from xllm_jax.core import checkpoint, rules
from xllm_jax.core.errors import UserError
from xllm_jax.launch import convert as launcher

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module", autouse=True)
def shapes_are_traced_once():
    """A case's network is traced for its shapes once, not at each import and export of it."""
    known, trace = {}, sizes.shapes_of

    def remembered(model, *inputs):
        key = repr((model, inputs))
        if key not in known:
            known[key] = trace(model, *inputs)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sizes, "shapes_of", remembered)
        yield


def same(first, second) -> bool:
    first, second = np.asarray(first), np.asarray(second)
    return (first.shape, first.dtype, first.tobytes()) == (
        second.shape,
        second.dtype,
        second.tobytes(),
    )


def leaves_of(base) -> dict[str, np.ndarray]:
    return {path: leaf.read().result() for path, leaf in checkpoint.open_leaves(base).items()}


@pytest.mark.parametrize("case", published.CASES)
def test_every_source_comes_in_and_goes_out_bit_by_bit(case, tmp_path):
    source, _ = published.CASES[case]
    tensors, leaves = published.tensors_of(case)
    if case == "chatglm":
        path = published.write_shards(tensors, tmp_path / "in", "bin")
    elif case == "blip2 stage 2":
        path = published.write_torch(tensors, tmp_path / "in.pth", "model")
    else:
        path = published.write_safetensors(tensors, tmp_path / "in.safetensors")
    done = run_import.run_import(source, path, tmp_path / "base")
    held = leaves_of(tmp_path / "base")
    assert held.keys() == leaves.keys()
    assert all(same(held[path], leaves[path]) for path in leaves)
    left = published.LEFT_OUT.get(case, {}).keys()
    tied = done.dropped.keys() - left
    assert left <= done.dropped.keys() and all(
        done.dropped[name].startswith("rep") for name in tied
    )
    names = run_export.run_export(source, tmp_path / "base", tmp_path / "out")
    again = files.open_checkpoint(tmp_path / "out")
    assert names == ["model.safetensors"] and again.keys() == tensors.keys() - left
    assert all(same(again[name], tensors[name]) for name in again)
    record = json.loads((tmp_path / "base" / "conversion.json").read_text())
    assert record["source"] == source and record["version"] and not record["computed"]
    assert record["dropped"] == done.dropped and record["dtypes"] == {
        "float16": len(again) - len(tied)
    }
    for entry in record["files"]:
        file = path / entry["name"] if path.is_dir() else path
        printed = subprocess.run(["sha256sum", file], capture_output=True, text=True, check=True)
        assert printed.stdout.split()[0] == entry["sha256"]
        assert file.stat().st_size == entry["bytes"]


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32])
def test_other_dtypes_and_shards_of_safetensors(dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(run_export, "SHARD", 3000)
    monkeypatch.setattr(run_import, "BLOCK", 600)  # several blocks in every leaf
    tensors, leaves = published.tensors_of("chatglm", dtype)
    path = published.write_shards(tensors, tmp_path / "in", "safetensors")
    run_import.run_import("chatglm", path, tmp_path / "base")
    held = leaves_of(tmp_path / "base")
    assert all(same(held[path], leaves[path]) for path in leaves)
    names = run_export.run_export("chatglm", tmp_path / "base", tmp_path / "out")
    again = files.open_checkpoint(tmp_path / "out")
    assert len(names) > 3 and again.files == [tmp_path / "out" / name for name in names]
    assert all(same(again[name], tensors[name]) for name in tensors)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == published.CONFIG  # the folder is whole again: it converts once more
    assert run_import.run_import("chatglm", tmp_path / "out", tmp_path / "twice").dropped


def test_a_stage_loads_the_base_and_says_where_it_comes_from(tmp_path, capsys):
    tensors, leaves = published.tensors_of("eva_vit")
    path = published.write_safetensors(tensors, tmp_path / "eva.safetensors")
    run_import.run_import("eva_vit", path, tmp_path / "base")
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = {
        path: jax.ShapeDtypeStruct(leaf.shape, np.float32, sharding=here)
        for path, leaf in leaves.items()
    }
    loaded = parameters.load(str(tmp_path / "base"), "vision_encoder", like)
    assert loaded.keys() == leaves.keys()
    assert all(same(loaded[path], leaves[path].astype(np.float32)) for path in leaves)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "converted from eva_vit: eva.safetensors" in said
    assert files_digest(path)[:12] in said and "3 tensors dropped" in said


def files_digest(path) -> str:
    printed = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True)
    return printed.stdout.split()[0]


class Evil:
    def __reduce__(self):
        return (print, ("code ran",))


def good() -> dict[str, np.ndarray]:
    return published.tensors_of("chatglm")[0]


LAYER = "transformer.layers.1.mlp.dense_h_to_4h.weight"
NORM = "transformer.layers.2.input_layernorm.bias"
SECOND = "model-00002-of-00003.bin"


def edited(change):
    """Shards of tensors that `change` has been at."""

    def write(folder, end):
        tensors = good()
        change(tensors)
        published.write_shards(tensors, folder, end)

    return write


def poison(value):
    def change(tensors):
        tensors[LAYER] = tensors[LAYER].copy()
        tensors[LAYER][3, 5] = value

    return edited(change)


def remade(name, make):
    return edited(lambda tensors: tensors.update({name: make(tensors.get(name))}))


def shard_holding(folder, name) -> Path:
    index = json.loads(next(folder.glob("*.index.json")).read_text())
    return folder / index["weight_map"][name]


def damaged(change):
    """Good shards, of which one is damaged afterwards."""

    def write(folder, end):
        published.write_shards(good(), folder, end)
        change(shard_holding(folder, LAYER))

    return write


def lossy(path):
    """A shard without a tensor that the index promises."""
    held = {name: tensor for name, tensor in files._open_file(path).items() if name != LAYER}
    held = {name: tensor.copy() for name, tensor in held.items()}
    (published.write_torch if path.suffix == ".bin" else published.write_safetensors)(held, path)


def cut(path):
    path.write_bytes(path.read_bytes()[:-40])


BAD = {
    "nan": (poison(np.nan), ["NaN", LAYER, "SHARD"]),
    "infinity": (poison(-np.inf), ["infinite", LAYER, "SHARD"]),
    "missing tensor": (edited(lambda t: t.pop(NORM)), [NORM, "no such tensor", "FOLDER"]),
    "extra tensor": (remade("more", lambda _: np.zeros(3, np.float16)), ["more", "no row"]),
    "shape": (remade(LAYER, lambda x: x[:, :-1]), [LAYER, "shape", "SHARD"]),
    "axes": (remade(NORM, lambda x: x[None]), [NORM, "shape"]),
    "integers": (remade(NORM, lambda x: x.astype(np.int32)), [NORM, "int32"]),
    "all integers": (
        edited(
            lambda t: t.update(
                {n: x.astype(np.int8) for n, x in t.items() if n.endswith("input_layernorm.bias")}
            )
        ),
        ["int8", "SHARD", "input_layernorm.bias"],
    ),
    "double": (remade("transformer.final_layernorm.bias", np.float64), ["float64"]),
    "mixed dtype": (remade(NORM, lambda x: x.astype(np.float32)), [NORM, "float32"]),
    "untied head": (remade("lm_head.weight", lambda x: x + 1), ["lm_head.weight", "tied"]),
    "missing shard": (damaged(Path.unlink), ["missing", "SHARD"]),
    "lost by a shard": (damaged(lossy), [LAYER, "promises", "SHARD"]),
    "truncated": (damaged(cut), ["SHARD"]),
    "not a checkpoint": (damaged(lambda path: path.write_bytes(b"hello")), ["SHARD"]),
}


@pytest.mark.parametrize("end", ["bin", "safetensors"])
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_by_file_and_tensor(case, end, tmp_path):
    write, told = BAD[case]
    folder = tmp_path / "in"
    write(folder, end)
    with pytest.raises(UserError) as caught:
        run_import.run_import("chatglm", folder, tmp_path / "base")
    line = str(caught.value)
    assert "\n" not in line and str(folder) in line and caught.value.hint
    for word in told:
        if word == "SHARD":
            assert "model-0000" in line, line
        else:
            assert (str(folder) if word == "FOLDER" else word) in line, line
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, capsys):
    path = tmp_path / "eva_vit_g.pth"
    torch.save({"cls_token": torch.zeros(3), "note": Evil()}, path)
    bare = tmp_path / "bare.bin"
    bare.write_bytes(pickle.dumps({"cls_token": Evil()}))
    for file in (path, bare):
        with pytest.raises(UserError, match=f"{file.name}.*code"):
            run_import.run_import("eva_vit", file, tmp_path / "base")
    assert "code ran" not in capsys.readouterr().out
    assert not (tmp_path / "base").exists()


def test_another_kind_is_refused_by_its_name(tmp_path):
    for case, (source, _) in published.CASES.items():
        path = published.write_safetensors(
            published.tensors_of(case)[0], tmp_path / f"{case}.safetensors"
        )
        wrong = "bert" if source != "bert" else "eva_vit"
        with pytest.raises(UserError, match=rf"looks like .*{source}.*, not {wrong}"):
            run_import.run_import(wrong, path, tmp_path / "base")
    published.write_safetensors({"x": np.zeros(3, np.float32)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="this is no bert"):
        run_import.run_import("bert", tmp_path / "x.safetensors", tmp_path / "base")
    with pytest.raises(UserError, match=r"--source: unknown source 'brt'. .*bert"):
        run_import.run_import("brt", tmp_path / "x.safetensors", tmp_path / "base")


@pytest.mark.parametrize(("frequencies", "fits"), [(2, True), (4, False), (1, False)])
def test_a_wrong_number_of_heads_is_told_by_the_rotary_buffers(frequencies, fits, tmp_path):
    name = "transformer.layers.0.attention.rotary_emb.inv_freq"
    tensors = good() | {name: np.ones(frequencies, np.float16)}
    opened = files.open_checkpoint(published.write_shards(tensors, tmp_path / "in", "safetensors"))
    if fits:  # width 16, two heads: 8 a head, 4 for each of two positions, 2 frequencies
        assert run_import.source_named("chatglm").options(opened, "")["heads"] == 2
        return
    with pytest.raises(UserError, match=r"inv_freq: .*2 heads at width 16.*num_attention_heads"):
        run_import.source_named("chatglm").options(opened, "")


def test_what_stands_at_the_output_is_safe(tmp_path):
    path = published.write_shards(good(), tmp_path / "in", "bin")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for output in (tmp_path / "mine", path):
        before = sorted(output.iterdir())
        with pytest.raises(UserError, match="--output"):
            run_import.run_import("chatglm", path, output)
        assert sorted(output.iterdir()) == before
    run_import.run_import("chatglm", path, tmp_path / "base")
    before = leaves_of(tmp_path / "base")
    (path / SECOND).unlink()
    with pytest.raises(UserError):
        run_import.run_import("chatglm", path, tmp_path / "base")
    after = leaves_of(tmp_path / "base")
    assert all(same(after[name], before[name]) for name in before)
    with pytest.raises(UserError, match="is there already"):
        run_export.run_export("chatglm", tmp_path / "base", tmp_path / "mine")
    with pytest.raises(UserError, match="converted from chatglm, not bert"):
        run_export.run_export("bert", tmp_path / "base", tmp_path / "out")


@contextlib.contextmanager
def files_end_at(size: int):
    """No file may grow beyond a limit, which is how a full disk looks from inside."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fills_up_leaves_nothing_behind(tmp_path, capfd):
    path = ROOT / "xllm_jax/data/synthetic_world/backbones/vision_encoder"
    with files_end_at(100_000), pytest.raises(UserError, match="cannot be written") as caught:
        run_import.run_import("world", path, tmp_path / "base")
    assert str(caught.value).startswith("vision_encoder/")
    assert not list(tmp_path.iterdir())
    run_import.run_import("world", path, tmp_path / "base")
    with files_end_at(100_000), pytest.raises(UserError, match="cannot be written") as caught:
        run_export.run_export("world", tmp_path / "base", tmp_path / "out")
    assert str(caught.value).startswith("model.safetensors: ")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    assert "Traceback" not in capfd.readouterr().err


def test_too_little_room_is_told_before_anything_is_written(tmp_path, monkeypatch):
    path = published.write_shards(good(), tmp_path / "in", "bin")
    monkeypatch.setattr(run_import.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(UserError, match=r"base: cannot be written \(needs .* MB are free\)"):
        run_import.run_import("chatglm", path, tmp_path / "base")
    assert not (tmp_path / "base").exists()


def test_a_base_that_we_trained_is_exported_without_a_record(tmp_path):
    """A run has no conversion.json: the source's usual layout at the size that is named."""
    from xllm_jax.convert.sources import eva_vit

    plan = eva_vit.plan(eva_vit.options(None, "tiny"))
    generator = np.random.default_rng(1)
    params = {
        path: generator.normal(size=x.shape).astype(np.float32)
        for path, x in rules.flatten(plan.shapes).items()
    }
    checkpoint.save_base(tmp_path / "base", rules.unflatten(params), {})
    run_export.run_export("eva_vit", tmp_path / "base", tmp_path / "out", "tiny")
    names = files.open_checkpoint(tmp_path / "out")
    up = params["vision_encoder/layers/feed_forward/up/kernel"]
    assert same(names["blocks.2.mlp.fc1.weight"], up[2].T)
    query, key = (
        params[f"vision_encoder/layers/attention/{n}/kernel"][1] for n in ("query", "key")
    )
    width = up.shape[1]
    fused = names["blocks.1.attn.qkv.weight"]
    assert same(fused[:width], query.reshape(width, width).T)
    assert same(fused[width : 2 * width], key.reshape(width, width).T)
    with pytest.raises(UserError, match="the base lacks this parameter"):
        run_export.run_export("chatglm", tmp_path / "base", tmp_path / "no", "tiny")


def test_the_command_line(tmp_path, monkeypatch, capsys):
    """Success by a call; what only a process shows, exit code and a single line, by one."""
    path = published.write_shards(good(), tmp_path / "in", "bin")
    flags = {"SOURCE": "chatglm", "INPUT": str(path), "OUTPUT": str(tmp_path / "base")}
    rest = {"VERIFY": "", "SIZE": "", "DIRECTION": "import", "KEEP_PACKED": False}
    values = {**rest, **flags}
    for name, value in values.items():
        monkeypatch.setattr(launcher, name, SimpleNamespace(value=value))
    assert launcher.main([]) == 0
    printed = capsys.readouterr().out
    assert "1 dropped" in printed and (tmp_path / "base" / "conversion.json").exists()
    command = [sys.executable, "launch/convert.py", "--source=blip2", f"--input={path}"]
    command.append(f"--output={tmp_path / 'other'}")
    refused = forked.run(command, capture_output=True, text=True, cwd=ROOT)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert "this looks like chatglm" in refused.stderr and "not blip2" in refused.stderr
    assert not (tmp_path / "other").exists()
