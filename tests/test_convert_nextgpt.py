"""NExT-GPT's delta, both ways: the recorded weights, each stage's names, what is refused."""

from __future__ import annotations

import json

import numpy as np
import published
import pytest
from conftest import GOLDEN
from test_convert_command import leaves_of, same

from xllm_jax.assembly import parameters
from xllm_jax.assembly.system import System
from xllm_jax.convert import conversion_record, files, run_export, run_import
from xllm_jax.convert.sources import llama, nextgpt, peft_lora
from xllm_jax.convert.verify.nextgpt_lora import adapters_of
from xllm_jax.convert.verify.nextgpt_losses import ADAPTED, HEADS
from xllm_jax.core import checkpoint, mesh, rules
from xllm_jax.core.errors import UserError
from xllm_jax.core.lora_settings import Lora
from xllm_jax.core.stage import Data, Output, Part, Signals, Stage
from xllm_jax.models import causal

RECORDED = GOLDEN / "nextgpt"
CONFIG = json.loads((RECORDED / "losses.json").read_text())["config"]


def recorded(adapted=True) -> dict[str, np.ndarray]:
    """What the reference saves of its last stage, or of one before, from the recorded weights."""
    with np.load(RECORDED / "losses.npz") as file:
        weights = {name[2:]: file[name] for name in file if name.startswith("w/")}
        low = {name[5:]: file[name] for name in file if name.startswith("lora/")}
    kept = ("gen_text", "llama_proj", "llama_model.lm_head", "llama_model.model.embed")
    delta = {name: x for name, x in weights.items() if name.startswith(kept)}
    if not adapted:
        return delta
    named = {name.replace("llama_model.", ADAPTED): x for name, x in delta.items()}
    return named | low


def write(tensors, tmp_path, heads=True):
    folder = tmp_path / "delta"
    folder.mkdir()
    if heads:
        told = {"num_attention_heads": CONFIG["sizes"]["heads"]}
        (folder / "config.json").write_text(json.dumps(told))
    published.write_torch(tensors, folder / "pytorch_model.pt")
    return folder


def test_the_recorded_delta_comes_in_and_goes_out_bit_by_bit(tmp_path):
    tensors = recorded()
    folder = write(tensors, tmp_path)
    done = run_import.run_import("nextgpt", folder, tmp_path / "base")
    assert not done.dropped and not done.fresh
    held = leaves_of(tmp_path / "base")
    assert {path.partition("/")[0] for path in held} == {
        *(f"{kind}_projection" for kind in HEADS),
        *("signal_tokens", "llm", "media_projection"),
    }
    run_export.run_export("nextgpt", tmp_path / "base", tmp_path / "out")
    again = files.open_checkpoint(tmp_path / "out")
    assert again.keys() == tensors.keys()
    assert all(same(again[name], tensors[name]) for name in tensors)


def test_a_delta_goes_through_in_many_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(run_import, "BLOCK", 600)
    tensors = recorded()
    run_import.run_import("nextgpt", write(tensors, tmp_path), tmp_path / "base")
    run_export.run_export("nextgpt", tmp_path / "base", tmp_path / "out")
    again = files.open_checkpoint(tmp_path / "out")
    assert again.keys() == tensors.keys()
    assert all(same(again[name], tensors[name]) for name in tensors)


def test_what_comes_in_is_what_the_recorded_losses_were_replayed_with(tmp_path):
    """Rows of the added tokens by their recorded ids, adapters merged as PyTorch would."""
    tensors = recorded()
    run_import.run_import("nextgpt", write(tensors, tmp_path), tmp_path / "base")
    held = rules.unflatten(leaves_of(tmp_path / "base"))
    table = tensors[f"{ADAPTED}{llama.WORDS}"]
    for kind, theirs in (("image", "img"), ("video", "video"), ("audio", "audio")):
        ids = CONFIG["ids"][theirs]
        assert same(held["signal_tokens"][f"{kind}_embedding"], table[ids])
        assert same(held["signal_tokens"][f"{kind}_head"], tensors[f"{ADAPTED}{llama.HEAD}"][ids])
        first = dict((name, at) for name, at, _ in nextgpt.registry(len(table)))[kind]
        assert first == ids[0]
    sizes = CONFIG["sizes"]
    model = causal.Causal(
        vocab=sizes["vocab"],
        width=sizes["d"],
        depth=sizes["layers"],
        heads=sizes["heads"],
        hidden=sizes["inter"],
    )
    rows = peft_lora.rows(model, peft_lora.TARGETS, ADAPTED)
    for path, leaf in rules.flatten(adapters_of(rows, tensors)).items():
        assert same(rules.flatten(held["llm"])[path], leaf)
    flat = rules.flatten(held["llm"])
    a, b, scale = (flat[f"layers/attention/query/{n}"] for n in ("lora_a", "lora_b", "lora_scale"))
    assert (scale == 32 / a.shape[-1]).all() and scale.shape == (sizes["layers"],)
    for layer in range(sizes["layers"]):
        at = f"{ADAPTED}model.layers.{layer}.self_attn.q_proj.lora_"
        whole = tensors[f"{at}B.default.weight"] @ tensors[f"{at}A.default.weight"]
        made = np.einsum("dr,rhk->dhk", a[layer], b[layer]).reshape(sizes["d"], -1)
        np.testing.assert_allclose(made, whole.T, atol=1e-6)


def test_an_earlier_stage_and_several_layers_need_no_number_of_heads(tmp_path):
    tensors = recorded(adapted=False)
    tensors |= {
        name.replace(".0.", ".1.", 1): x + 1
        for name, x in tensors.items()
        if name.startswith("gen_text_hidden_fcs.")
    }
    tensors = {name: x for name, x in tensors.items() if "_audio" not in name}
    folder = write({n: x.astype(np.float16) for n, x in tensors.items()}, tmp_path, heads=False)
    run_import.run_import("nextgpt", folder, tmp_path / "base")
    held = leaves_of(tmp_path / "base")
    parts = {path.partition("/")[0] for path in held}
    assert "audio_projection" not in parts
    assert not any("lora" in path for path in held)
    one, two = (held[f"image_projection/head_{n}/inputs/kernel"] for n in (0, 1))
    np.testing.assert_allclose(two - one, 1, atol=2e-3)
    (tmp_path / "base" / "conversion.json").unlink()  # as a run's result is
    run_export.run_export("nextgpt", tmp_path / "base", tmp_path / "out")
    again = files.open_checkpoint(tmp_path / "out")
    assert again.keys() == tensors.keys()
    assert all(same(again[name], tensors[name].astype(np.float16)) for name in tensors)


def test_a_base_without_a_record_tells_its_adapters(tmp_path):
    run_import.run_import("nextgpt", write(recorded(), tmp_path), tmp_path / "base")
    told = dict(conversion_record.read(tmp_path / "base").options)
    assert told["lora"].pop("scale") == 32 / told["lora"]["rank"]
    told["lora"]["scale"] = None  # what the parameters themselves hold
    (tmp_path / "base" / "conversion.json").unlink()
    shapes = {p: tuple(x.shape) for p, x in checkpoint.open_leaves(tmp_path / "base").items()}
    assert nextgpt.options_of(nextgpt.Base(shapes, tmp_path)) == told


def test_trained_rows_go_out_in_the_tables(tmp_path):
    tensors = recorded(adapted=False)
    run_import.run_import("nextgpt", write(tensors, tmp_path), tmp_path / "base")
    held = leaves_of(tmp_path / "base")
    held["signal_tokens/image_head"] = held["signal_tokens/image_head"] + 3
    checkpoint.save_base(tmp_path / "trained", rules.unflatten(held), {"source": "a run"})
    run_export.run_export("nextgpt", tmp_path / "trained", tmp_path / "out")
    again = files.open_checkpoint(tmp_path / "out")
    changed = again[f"llama_model.{llama.HEAD}"] - tensors[f"llama_model.{llama.HEAD}"]
    rows = np.flatnonzero(np.abs(changed).max(1))
    assert rows.tolist() == CONFIG["ids"]["img"]
    np.testing.assert_allclose(changed[rows], 3, atol=1e-5)
    name = f"llama_model.{llama.WORDS}"
    assert same(again[name], tensors[name])


def lacking(tensors):
    del tensors["gen_text_hidden_fcs_video.0.tfm.decoder.layers.2.norm3.bias"]


def lacking_adapter(tensors):
    del tensors[f"{ADAPTED}model.layers.1.self_attn.v_proj.lora_B.default.weight"]


def of_another_layer(tensors):
    tensors["gen_text_hidden_fcs.0.tfm.decoder.layers.4.norm3.bias"] = np.zeros(12, np.float32)


def without_head(tensors):
    del tensors[f"{ADAPTED}{llama.HEAD}"]


def short_table(tensors):
    for name in (llama.WORDS, llama.HEAD):
        tensors[f"{ADAPTED}{name}"] = tensors[f"{ADAPTED}{name}"][:36]


def not_finite(tensors):
    tensors["llama_proj.bias"] = tensors["llama_proj.bias"] * np.nan


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lacking, "norm3.bias"),
        (lacking_adapter, "v_proj.lora_B"),
        (of_another_layer, "layers.4.norm3.bias"),
        (without_head, "lm_head"),
        (short_table, "embed_tokens"),
        (not_finite, "llama_proj.bias"),
    ],
)
def test_a_delta_that_is_not_whole_is_refused_by_name(change, named, tmp_path):
    tensors = recorded()
    change(tensors)
    folder = write(tensors, tmp_path)
    with pytest.raises(UserError) as error:
        run_import.run_import("nextgpt", folder, tmp_path / "base")
    assert named in str(error.value.field) and "\n" not in str(error.value)
    assert not (tmp_path / "base").exists()


def test_adapters_need_the_number_of_heads(tmp_path):
    folder = write(recorded(), tmp_path, heads=False)
    with pytest.raises(UserError, match="number of heads"):
        run_import.run_import("nextgpt", folder, tmp_path / "base")


def test_a_stage_takes_vicuna_and_the_delta_over_it(tmp_path):
    """Longer tables, adapters, projection and rows of signal tokens come from the delta."""
    sizes = CONFIG["sizes"]
    tensors = recorded()
    run_import.run_import("nextgpt", write(tensors, tmp_path), tmp_path / "delta_base")
    with np.load(RECORDED / "losses.npz") as file:
        llm = {name[14:]: file[name] for name in file if name.startswith("w/llama_model.")}
    for name in (llama.WORDS, llama.HEAD):
        llm[name] = llm[name][: sizes["vocab"]] + 1  # the base's own, shorter tables
    (tmp_path / "vicuna").mkdir()
    told = dict(
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        vocab_size=sizes["vocab"],
        hidden_size=sizes["d"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        intermediate_size=sizes["inter"],
        rms_norm_eps=sizes["eps"],
    )
    (tmp_path / "vicuna/config.json").write_text(json.dumps(told))
    published.write_safetensors(llm, tmp_path / "vicuna/model.safetensors")
    run_import.run_import("llama", tmp_path / "vicuna", tmp_path / "llm_base")
    rows, base = CONFIG["vocabulary_with_added_tokens"], str(tmp_path / "delta_base")
    rank = next(x.shape[0] for name, x in tensors.items() if "lora_A" in name)
    head = {"llm_width": sizes["d"], "width": sizes["head"], "output_width": sizes["outs"]["768"]}
    fields = dict(vocab=rows, width=sizes["d"], depth=sizes["layers"], heads=sizes["heads"])
    stage = Stage(
        parts={
            "llm": Part("causal.Causal", "vicuna_7b", fields | {"hidden": sizes["inter"]}),
            "signal_tokens": Part(
                "outputs.signal_tokens.SignalTokens", "tiny", {"width": sizes["d"]}
            ),
            "image_projection": Part("outputs.projection.TransformerProjection", "real", head),
        },
        outputs={"image": Output("image_projection")},
        init={
            "llm": str(tmp_path / "llm_base"),
            "llm/embedding": base,
            "llm/head": base,
            "signal_tokens": f"{base}*",
            "image_projection": base,
        },
        trainable=("image_projection/.*",),
        lora=Lora(rank, "llm/layers/attention/.*", alpha=32.0, init=base),
        data=Data(
            llm_family="vicuna_v0",
            template="vicuna_v0",
            signals={"image": Signals(CONFIG["ids"]["img"][0], 4)},
        ),
        compute="float32",
        frozen="float32",
    )
    found = rules.flatten(parameters.parameters(System.build(stage, mesh.make({}))))
    delta, below = leaves_of(tmp_path / "delta_base"), leaves_of(tmp_path / "llm_base")
    for path, leaf in found.items():
        held = delta if path in delta else below
        np.testing.assert_array_equal(np.asarray(leaf), held[path], err_msg=path)
    assert found["llm/embedding"].shape[0] == rows
    assert sum("lora_a" in path for path in found) == len(peft_lora.TARGETS)
