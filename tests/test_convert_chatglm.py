"""ChatGLM's releases: both vocabularies, dtypes and file forms, INT4 and INT8."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
from published import to_torch

from xllm_jax.convert import export_tree, files, run_export, run_import, sizes
from xllm_jax.convert.sources import chatglm
from xllm_jax.convert.sources import chatglm_quantized as quantized
from xllm_jax.core import rules
from xllm_jax.core.errors import UserError
from xllm_jax.data.text.glm_layout import Specials
from xllm_jax.models import glm

torch = pytest.importorskip("torch")

SMALL = dict(vocab=96, width=16, depth=2, heads=2, hidden=32)
SPECIALS = Specials(mask=90, gmask=91, sop=92, eop=93, pad=3)
QUANTISED = (
    "attention.query_key_value",
    "attention.dense",
    "mlp.dense_h_to_4h",
    "mlp.dense_4h_to_h",
)


def tensors_of(model: glm.ChatGLM, dtype=np.float16, scale: float = 0.3) -> dict[str, np.ndarray]:
    """A random checkpoint under the published names, without a head."""
    generator = np.random.default_rng(0)
    flat = rules.flatten(sizes.shapes_of(model))
    params = {
        path: ((path.endswith("scale") + scale * generator.normal(size=x.shape)).astype(dtype))
        for path, x in flat.items()
    }
    return export_tree(chatglm.rows(model.depth, model.heads), rules.unflatten(params))


def exported(model: glm.ChatGLM, params: dict) -> dict[str, np.ndarray]:
    """Our parameters under the published names, with the head."""
    tensors = export_tree(chatglm.rows(model.depth, model.heads), params)
    return tensors | {chatglm.HEAD: tensors[chatglm.WORDS]}


def write_folder(folder, model, tensors, form="bin"):
    """The published layout: config.json with two shards and their index, or one safetensors."""
    folder.mkdir()
    config = chatglm.config_of(model, SPECIALS)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: to_torch(tensor) for name, tensor in tensors.items()}
    if form == "safetensors":
        from safetensors.torch import save_file

        save_file(tensors, str(folder / "model.safetensors"))
        return
    names = sorted(tensors)
    shards = [names[: len(names) // 2], names[len(names) // 2 :]]
    index = {}
    for number, shard in enumerate(shards, start=1):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({name: tensors[name] for name in shard}, folder / file)
        index |= dict.fromkeys(shard, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))


def same_bits(first: np.ndarray, second: np.ndarray) -> bool:
    alike = first.dtype == second.dtype and first.shape == second.shape
    return alike and np.asarray(first).tobytes() == np.asarray(second).tobytes()


@pytest.mark.parametrize(
    ("vocab", "dtype", "form"),
    [
        (130528, np.float16, "bin"),
        (150528, ml_dtypes.bfloat16, "bin"),
        (150528, np.float16, "safetensors"),
        (130528, ml_dtypes.bfloat16, "safetensors"),
    ],
)
def test_every_release_comes_back_bit_by_bit(vocab, dtype, form, tmp_path):
    model = glm.ChatGLM(**SMALL | {"vocab": vocab})
    tensors = tensors_of(model, dtype)
    tensors[chatglm.HEAD] = tensors[chatglm.WORDS]
    frequencies = {f"transformer.layers.{n}.attention.rotary_emb.inv_freq" for n in range(2)}
    buffers = {name: np.arange(2, dtype=dtype) for name in frequencies}
    write_folder(tmp_path / "glm", model, tensors | buffers, form)
    found = run_import.examine("chatglm", tmp_path / "glm")
    params = found.tree()["llm"]
    assert chatglm.network(found.options) == model and params["embedding"].dtype == dtype
    report = found.report
    assert report.dropped.keys() == frequencies | {chatglm.HEAD} and not report.fresh
    back = exported(model, params)
    assert back.keys() == tensors.keys()
    assert all(same_bits(back[name], tensors[name]) for name in tensors)


def test_the_configuration_keeps_an_alpha_of_ours():
    model = glm.ChatGLM(**SMALL, alpha=2.5)
    assert glm.ChatGLM(**chatglm.fields(chatglm.config_of(model, SPECIALS))) == model


def published_quantization(weight: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """What the release's QuantizedLinear stores of a half-precision weight, byte by byte."""
    weight = torch.from_numpy(weight.copy())
    scale = (weight.abs().max(dim=-1).values / (2 ** (bits - 1) - 1)).half()
    integers = torch.round(weight / scale[:, None]).to(torch.int8).numpy()
    if bits == 4:
        packed = np.zeros((len(integers), integers.shape[1] // 2), np.int8)
        for row, column in np.ndindex(packed.shape):
            first, second = (int(integers[row, 2 * column + i]) % 16 for i in (0, 1))
            packed[row, column] = np.uint8(first * 16 + second).view(np.int8)
        integers = packed
    return integers, scale.numpy()


def quantized_release(model, bits, embeddings=False):
    """(ordinary tensors with the quantized ones replaced, the names of the weights)."""
    tensors = tensors_of(model)
    tensors[chatglm.HEAD] = tensors[chatglm.WORDS]
    weights = [f"transformer.layers.{n}.{k}.weight" for n in range(model.depth) for k in QUANTISED]
    weights += [chatglm.WORDS, chatglm.HEAD] if embeddings else []
    for name in weights:
        integers, scale = published_quantization(tensors[name], bits)
        tensors |= {name: integers, name.replace(".weight", ".weight_scale"): scale}
    return tensors, weights


def products(tensor: np.ndarray, scale: np.ndarray, bits: int) -> np.ndarray:
    """Dequantized one number at a time, rounded to half as the CUDA kernel does."""
    rows = []
    for row, factor in zip(tensor.astype(int) % 256, scale):
        values = [b for byte in row for b in ((byte // 16, byte % 16) if bits == 4 else (byte,))]
        half = 2 ** (bits - 1)
        signed = [value - 2 * half if value >= half else value for value in values]
        rows.append([np.float16(float(factor) * value) for value in signed])
    return np.array(rows, np.float16)


@pytest.mark.parametrize(("bits", "embeddings"), [(4, False), (8, False), (4, True)])
def test_quantized_releases(bits, embeddings, tmp_path):
    """The int4, int8 and int4-qe releases, the last with quantized embeddings and head."""
    model = glm.ChatGLM(**SMALL)
    tensors, weights = quantized_release(model, bits, embeddings)
    write_folder(tmp_path / "glm", model, tensors)
    found = run_import.examine("chatglm", tmp_path / "glm")
    assert found.report.dropped.keys() == {chatglm.HEAD} and not found.report.fresh
    ordinary = exported(model, found.tree()["llm"])
    for name in weights:
        expected = products(tensors[name], tensors[name.replace("weight", "weight_scale")], bits)
        assert same_bits(ordinary[name], expected), name
    back = quantized.restore(ordinary, dict.fromkeys(weights, bits))
    assert back.keys() == tensors.keys()
    assert all(same_bits(back[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_command_takes_a_quantized_release_there_and_back(bits, tmp_path):
    tensors, _ = quantized_release(glm.ChatGLM(**SMALL), bits, embeddings=bits == 4)
    write_folder(tmp_path / "glm", glm.ChatGLM(**SMALL), tensors)
    run_import.run_import("chatglm", tmp_path / "glm", tmp_path / "base")
    run_export.run_export("chatglm", tmp_path / "base", tmp_path / "back")
    back = files.open_checkpoint(tmp_path / "back")
    assert set(back) == tensors.keys()
    assert all(same_bits(back[name], tensors[name]) for name in tensors)


def test_integers_of_every_size_come_back():
    """Scales from the smallest subnormal half to the largest whose products are finite."""
    generator = np.random.default_rng(3)
    for bits, limit in quantized.LIMITS.items():
        scale = np.arange(1, 0x7BFF // (12 if bits == 4 else 3), 37).astype(np.uint16)
        scale = scale.view(np.float16)
        integers = generator.integers(-limit, limit + 1, (len(scale), 64)).astype(np.int8)
        integers[:, 5], integers[:, 9] = -limit, 1
        integers[7] = 0
        scale[7] = 0
        weight = integers.astype(np.float16) * scale[:, None]
        assert np.isfinite(weight).all()
        back = quantized.restore({"x.weight": weight}, {"x.weight": bits})
        expected = integers if bits == 8 else quantized.pack(integers)
        assert same_bits(back["x.weight"], expected)
        assert same_bits(back["x.weight_scale"], scale)


QKV = "transformer.layers.0.attention.query_key_value.weight"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t.update({QKV: t[QKV][:, :-1]}), "neither INT8 nor INT4"),
        (lambda t: t.update({QKV: t[QKV][:-1]}), "neither INT8 nor INT4"),
        (lambda t: t.update({QKV: t[QKV].astype(np.float16)}), "not an int8 matrix"),
        (lambda t: t.update({f"{QKV}_scale": t[f"{QKV}_scale"] * np.float16(np.nan)}), "finite"),
        (lambda t: t.pop(QKV), "the scales have no"),
        (lambda t: t.pop(f"{QKV}_scale"), "shape"),
    ],
)
def test_a_wrong_quantized_release_is_refused_by_name(change, told, tmp_path):
    model = glm.ChatGLM(**SMALL)
    tensors, _ = quantized_release(model, 4)
    change(tensors)
    write_folder(tmp_path / "glm", model, tensors)
    with pytest.raises(UserError, match=told) as caught:
        run_import.examine("chatglm", tmp_path / "glm").tree()
    assert QKV in str(caught.value)


def test_weights_that_were_never_integers_do_not_become_some():
    model = glm.ChatGLM(**SMALL)
    tensors = tensors_of(model)
    with pytest.raises(UserError, match="row 0") as caught:
        quantized.restore(tensors, {QKV: 8})[QKV]
    assert caught.value.field == QKV
