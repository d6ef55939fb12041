"""Folders of causal decoders, as transformers writes them, in and out; configurations refused."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from test_causal import FAMILIES, SMALL, VOCAB

from xllm_jax.assembly import parameters
from xllm_jax.convert import files, run_export, run_import
from xllm_jax.convert.sources import llama, llama_config
from xllm_jax.core import base_description
from xllm_jax.core.errors import UserError


def network(family: str) -> transformers.PreTrainedModel:
    name, more = FAMILIES[family]
    torch.manual_seed(1)
    config = getattr(transformers, f"{name}Config")(**(SMALL | more))
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for leaf in model.parameters():
            leaf.copy_(torch.randn_like(leaf))
    return model


def logits(model: transformers.PreTrainedModel) -> torch.Tensor:
    ids = torch.arange(1, 12)[None] % VOCAB
    with torch.no_grad():
        return model(ids).logits


def save(model: transformers.PreTrainedModel, folder, end: str) -> None:
    """In shards, as published."""
    model.save_pretrained(folder, max_shard_size="20KB")
    if end == "bin":
        index = folder / "model.safetensors.index.json"
        names = json.loads(index.read_text())["weight_map"]
        state, places = model.state_dict(), {}
        for number, file in enumerate(sorted(set(names.values()))):
            held = {name: state[name] for name in names if names[name] == file}
            torch.save(held, folder / f"pytorch_model-{number}.bin")
            places |= dict.fromkeys(held, f"pytorch_model-{number}.bin")
            (folder / file).unlink()
        index.unlink()
        text = json.dumps({"weight_map": places})
        (folder / "pytorch_model.bin.index.json").write_text(text)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_comes_in_and_goes_out(family, tmp_path):
    """What is written again is the same model for transformers, bit by bit."""
    model = network(family)
    save(model, tmp_path / "in", "bin" if family == "qwen2" else "safetensors")
    assert len(list((tmp_path / "in").glob("*-*"))) > 2
    done = run_import.run_import("llama", tmp_path / "in", tmp_path / "base")
    assert done.options == run_import.examine("llama", tmp_path / "in").options
    run_export.run_export("llama", tmp_path / "base", tmp_path / "out")
    given, made = (files.open_checkpoint(tmp_path / name) for name in ("in", "out"))
    assert given.keys() == made.keys()
    for name in given:
        np.testing.assert_array_equal(given[name], made[name])
    again = type(model).from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    assert torch.equal(logits(again), logits(model))


def test_fields_that_no_shape_shows_are_recorded(tmp_path):
    """A stage with other rotary positions does not load the base."""
    save(network("llama3"), tmp_path / "in", "safetensors")
    run_import.run_import("llama", tmp_path / "in", tmp_path / "base")
    record = json.loads((tmp_path / "base" / base_description.CONVERSION).read_text())
    said = record["fields"]["llm"]
    assert said["scaling"]["kind"] == "llama3" and said["scaling"]["factor"] == 8.0
    assert said["theta"] == 500000.0 and said["norm_epsilon"] == 1e-6
    made = llama.network(record["options"])
    parameters.check_fields({"llm": made}, str(tmp_path / "base"), "llm")
    for field, value in (("scaling", {}), ("theta", 10000.0), ("norm_epsilon", 1e-5)):
        other = made.clone(**{field: value})
        with pytest.raises(UserError, match=rf"parts\.llm\.fields\.{field}"):
            parameters.check_fields({"llm": other}, str(tmp_path / "base"), "llm")


@pytest.mark.parametrize("kind", llama_config.KINDS)
def test_fields_that_are_left_out_are_those_of_transformers(kind):
    name = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "glm4": "Glm4"}[kind]
    config = getattr(transformers, f"{name}Config")()
    known = llama_config.DEFAULTS | llama_config.KINDS[kind]
    for field in ("rms_norm_eps", "max_position_embeddings", "hidden_act", "tie_word_embeddings"):
        assert known[field] == getattr(config, field), field
    heads, keys = known["num_key_value_heads"], config.num_key_value_heads
    assert (heads or config.num_attention_heads) == keys
    width = config.hidden_size // config.num_attention_heads
    assert (known["head_dim"] or width) == (getattr(config, "head_dim", None) or width)
    rope = config.rope_parameters
    assert rope["rope_theta"] == known["rope_theta"] and rope["rope_type"] == "default"
    assert rope.get("partial_rotary_factor", 1.0) == known["partial_rotary_factor"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    save(network("llama"), folder, "safetensors")
    return folder


REFUSED = {
    "sliding_window": ({"sliding_window": 16}, "sliding_window"),
    "use_sliding_window": (
        {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 16},
        "use_sliding_window",
    ),
    "layer_types": ({"layer_types": ["sliding_attention"] * 3}, "layer_types"),
    "rope": ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_parameters"),
    "rope_scaling": (
        {"rope_parameters": None, "rope_scaling": {"type": "longrope"}},
        "rope_scaling",
    ),
    "rope_key": (
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "beta": 3}},
        "rope_parameters",
    ),
    "rope_missing": ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act"),
    "mlp_bias": ({"mlp_bias": True}, "mlp_bias"),
    "attention_bias": ({"attention_bias": True}, "attention_bias"),
    "unknown": ({"logit_scale": 0.1}, "logit_scale"),
    "experts": ({"num_local_experts": 8}, "num_local_experts"),
    "quantized": ({"quantization_config": {"bits": 4}}, "quantization_config"),
    "another model": ({"model_type": "mistral"}, "model_type"),
    "part of a head": ({"partial_rotary_factor": 0.5, "rope_parameters": None}, "partial_rotary"),
    "heads": ({"num_attention_heads": 6}, "num_attention_heads"),
    "key heads": ({"num_key_value_heads": 3}, "num_key_value_heads"),
    "fewer key heads": ({"num_key_value_heads": 1}, "num_key_value_heads"),
    "width": ({"hidden_size": 64}, "hidden_size"),
    "depth": ({"num_hidden_layers": 2}, "num_hidden_layers"),
    "odd heads": ({"head_dim": 5}, "head_dim"),
    "epsilon": ({"rms_norm_eps": "small"}, "rms_norm_eps"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_madeis_not_is_refused_by_name(case, whole, tmp_path):
    changed, field = REFUSED[case]
    shutil.copytree(whole, tmp_path / "in")
    file = tmp_path / "in" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    with pytest.raises(UserError) as refusal:
        run_import.run_import("llama", tmp_path / "in", tmp_path / "base")
    assert field in refusal.value.field and str(file) in refusal.value.field
    assert "\n" not in str(refusal.value) and not (tmp_path / "base").exists()


def test_what_is_off_changes_nothing(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "in")
    file = tmp_path / "in" / "config.json"
    off = {"logit_scale": None, "some_switch": False, "sliding_window": None}
    file.write_text(json.dumps(json.loads(file.read_text()) | off))
    made = run_import.examine("llama", tmp_path / "in").options
    assert made == run_import.examine("llama", whole).options


def test_a_head_that_differs_from_what_it_is_tied_to(tmp_path):
    model = network("llama_whole_heads")
    save(model, tmp_path / "in", "bin")
    state = torch.load(tmp_path / "in" / "pytorch_model-0.bin")
    state[llama.HEAD] = torch.randn(VOCAB, 32)
    torch.save(state, tmp_path / "in" / "pytorch_model-0.bin")
    index = tmp_path / "in" / "pytorch_model.bin.index.json"
    places = json.loads(index.read_text())
    places["weight_map"][llama.HEAD] = "pytorch_model-0.bin"
    index.write_text(json.dumps(places))
    with pytest.raises(UserError, match="to which it is tied"):
        run_import.run_import("llama", tmp_path / "in", tmp_path / "base")
