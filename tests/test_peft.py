"""Adapters in and out of PEFT, with PEFT itself as the oracle, and what is refused."""

from __future__ import annotations

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from test_causal import FAMILIES, SMALL, VOCAB, close
from test_convert_chatglm import SMALL as GLM
from test_convert_chatglm import tensors_of, write_folder

from xllm_jax.convert import adapters, adapters_out, conversion_record, run_export, run_import
from xllm_jax.convert.sources import llama
from xllm_jax.core import checkpoint, rules
from xllm_jax.core.errors import UserError
from xllm_jax.models import glm, lora

# PEFT asks transformers for a property by its former name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
IDS = np.random.default_rng(5).integers(1, VOCAB, (2, 9)).astype(np.int32)
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
CASES = {
    "llama": dict(target_modules=ATTENTION, lora_alpha=6),
    "qwen2": dict(target_modules=["q_proj", "v_proj", "down_proj"], use_dora=True),
    "qwen3": dict(
        target_modules=["q_proj", "o_proj", "up_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 2},
        alpha_pattern={"o_proj": 3, "layers.0.mlp.up_proj": 5},
        layers_to_transform=[0, 1],
    ),
    "glm4": dict(target_modules=[*ATTENTION, "gate_up_proj"], use_dora=True, use_rslora=True),
}


def spread(model):
    """Random weights, adapters included: new ones change nothing."""
    torch.manual_seed(2)
    with torch.no_grad():
        for name, leaf in model.named_parameters():
            centre = 1.0 if leaf.ndim == 1 and "bias" not in name else 0.0
            leaf.copy_(centre + 0.2 * torch.randn_like(leaf))
    return model


def tree(*folders):
    """All leaves of some bases."""
    found = {}
    for folder in folders:
        stores = checkpoint.open_leaves(folder)
        found |= {path: store.read().result() for path, store in stores.items()}
    return jax.tree.map(jnp.asarray, rules.unflatten(found))["llm"]


class Family:
    """One family's base, in torch and converted, with a random adapter of PEFT."""

    def __init__(self, family, settings, folder):
        name, more = FAMILIES[family]
        config = getattr(transformers, f"{name}Config")(**(SMALL | more))
        base = spread(getattr(transformers, f"{name}ForCausalLM")(config)).eval()
        self.folder, self.kind, self.dora = folder, type(base), "use_dora" in settings
        base.save_pretrained(folder / "published")
        run_import.run_import("llama", folder / "published", folder / "base")
        self.ours = llama.network(conversion_record.read(folder / "base").options)
        adapted = peft.get_peft_model(base, peft.LoraConfig(r=4, **settings)).eval()
        with torch.no_grad():
            for name, leaf in adapted.named_parameters():
                if "lora_" in name:
                    leaf.copy_(0.3 + 0.2 * torch.randn_like(leaf))
        adapted.save_pretrained(folder / "adapter")
        self.theirs = self.logits(adapted)
        self.adapted = adapted
        self.call = jax.jit(self._run)

    def logits(self, model):
        with torch.no_grad():
            return model(torch.from_numpy(IDS).long()).logits

    def _run(self, params):
        x = self.ours.apply({"params": params}, IDS, method="embed")
        ones, places = np.ones(IDS.shape, np.int32), np.broadcast_to(np.arange(9), IDS.shape)
        rows = (ones, np.zeros(IDS.shape, bool), places[..., None])
        states, _ = self.ours.apply({"params": params}, x, *rows)
        return self.ours.apply({"params": params}, states, method="logits")


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    return Family(request.param, CASES[request.param], tmp_path_factory.mktemp(request.param))


def test_an_adapter_of_peft_comes_in_is_merged_and_goes_out(case):
    """Outputs are PEFT's: with the adapter beside the base, merged, and written again."""
    folder = case.folder
    said = adapters.import_adapter(folder / "adapter", folder / "base", folder / "ours")
    assert "of rank 4" in said and ("DoRA" in said) == case.dora
    close(case.call(tree(folder / "base", folder / "ours")), case.theirs)
    plain = case.call(tree(folder / "base"))
    assert np.abs(plain - case.theirs.numpy()).max() > 0.1
    adapters_out.merge(folder / "ours", folder / "merged", folder / "base")
    close(case.call(tree(folder / "merged")), case.theirs)
    run_export.run_export("llama", folder / "merged", folder / "merged_out")
    again = case.kind.from_pretrained(folder / "merged_out").eval()
    close(case.logits(again).numpy(), case.logits(case.adapted.merge_and_unload()))
    adapters_out.export_adapter(folder / "ours", folder / "out", folder / "base", name="a/b")
    written = json.loads((folder / "out" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == "a/b"
    base = case.kind.from_pretrained(folder / "published")
    back = peft.PeftModel.from_pretrained(base, folder / "out").eval()
    close(case.logits(back).numpy(), case.theirs)


def test_gate_and_up_of_glm_4_become_one_layer_of_a_larger_rank(tmp_path):
    """Ours have an adapter each, PEFT's fused layer has one."""
    case = Family("glm4", CASES["glm4"], tmp_path)
    shapes = {p: s.shape for p, s in checkpoint.open_leaves(tmp_path / "base").items()}
    made, rng = {}, np.random.default_rng(0)
    for name in ("gate", "up"):
        place = f"llm/layers/feed_forward/{name}"
        depth, width, hidden = shapes[f"{place}/kernel"]
        made[f"{place}/lora_a"] = rng.normal(size=(depth, width, 3)).astype(np.float32)
        made[f"{place}/lora_b"] = rng.normal(size=(depth, 3, hidden)).astype(np.float32)
        made[f"{place}/lora_scale"] = np.full(depth, 0.1 if name == "up" else 0.2, np.float32)
    checkpoint.save_base(tmp_path / "ours", rules.unflatten(made), {})
    adapters_out.export_adapter(tmp_path / "ours", tmp_path / "out", tmp_path / "base")
    base = case.kind.from_pretrained(tmp_path / "published")
    back = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    close(case.call(tree(tmp_path / "base", tmp_path / "ours")), case.logits(back))


class Layer(torch.nn.Module):
    """The dense layers of ChatGLM's block under their published names."""

    def __init__(self, width, hidden):
        super().__init__()
        self.attention, self.mlp = torch.nn.Module(), torch.nn.Module()
        self.attention.query_key_value = torch.nn.Linear(width, 3 * width)
        self.attention.dense = torch.nn.Linear(width, width)
        self.mlp.dense_h_to_4h = torch.nn.Linear(width, hidden)
        self.mlp.dense_4h_to_h = torch.nn.Linear(hidden, width)


@pytest.mark.parametrize("dora", [False, True])
def test_chatglm_whose_queries_keys_and_values_are_interleaved(dora, tmp_path):
    """PEFT's merged weights, converted, are our base with the adapter that it saved."""
    model = glm.ChatGLM(**GLM)
    tensors = tensors_of(model, np.float32)
    write_folder(tmp_path / "published", model, tensors, "safetensors")
    run_import.run_import("chatglm", tmp_path / "published", tmp_path / "base")
    theirs = torch.nn.Module()
    theirs.transformer = torch.nn.Module()
    theirs.transformer.layers = torch.nn.ModuleList(
        Layer(GLM["width"], GLM["hidden"]) for _ in range(GLM["depth"])
    )
    names = {name for name, _ in theirs.named_parameters()}
    theirs.load_state_dict({name: torch.from_numpy(tensors[name]) for name in names})
    targets = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, use_dora=dora)
    adapted = peft.get_peft_model(theirs, config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, leaf in adapted.named_parameters():
            if "lora_" in name:
                leaf.copy_(torch.rand_like(leaf))
    adapted.save_pretrained(tmp_path / "adapter")
    said = adapters.import_adapter(tmp_path / "adapter", tmp_path / "base", tmp_path / "ours")
    assert said.startswith(f"{4 * GLM['depth']} adapters of rank 3")
    merged = adapted.merge_and_unload().state_dict()
    adapters_out.merge(tmp_path / "ours", tmp_path / "merged", tmp_path / "base")
    run_export.run_export("chatglm", tmp_path / "merged", tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name in names:
        np.testing.assert_allclose(found[name], merged[name].numpy(), atol=2e-6, err_msg=name)
        if name.endswith("weight"):
            assert np.abs(found[name] - tensors[name]).max() > 0.1
    adapters_out.export_adapter(tmp_path / "ours", tmp_path / "back", tmp_path / "base")
    ours, given = (
        load_file(tmp_path / n / "adapter_model.safetensors") for n in ("back", "adapter")
    )
    assert ours.keys() == given.keys()
    for name in given:
        np.testing.assert_array_equal(ours[name], given[name])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A converted base and an adapter for it."""
    return Family("llama", CASES["llama"], tmp_path_factory.mktemp("whole"))


def changed(folder, target, config=None, tensors=None):
    """A copy of an adapter with another configuration or other tensors."""
    target.mkdir()
    said = json.loads((folder / "adapter_config.json").read_text()) | (config or {})
    (target / "adapter_config.json").write_text(json.dumps(said))
    held = load_file(folder / "adapter_model.safetensors")
    save_file(tensors(held) if tensors else held, target / "adapter_model.safetensors")
    return target


def renamed(held):
    return {name.replace("self_attn", "attention"): x for name, x in held.items()}


def narrowed(held):
    return {
        name: np.ascontiguousarray(x[:, :-1]) if "lora_A" in name else x for name, x in held.items()
    }


def infinite(held):
    return {name: x * np.float32(np.inf) for name, x in held.items()}


def halved(held):
    return dict(sorted(held.items())[::2])


@pytest.mark.parametrize(
    "config, tensors, message",
    [
        ({"r": 0}, None, "adapter_config.json: r is 0"),
        ({"r": 8}, None, "has the rank 4.*says 8"),
        ({"lora_alpha": "a lot"}, None, "lora_alpha is 'a lot'"),
        ({"peft_type": "IA3"}, None, "'IA3', not 'LORA'"),
        ({"bias": "all"}, None, "bias trains"),
        ({"modules_to_save": ["lm_head"]}, None, "modules_to_save is set"),
        ({"init_lora_weights": "pissa"}, None, "begins as 'pissa'"),
        ({"use_dora": True}, None, "lacks lora_magnitude_vector"),
        ({"rank_pattern": {"(": 1}}, None, "no regular expression"),
        ({}, renamed, "is of no layer of this base"),
        ({}, narrowed, "is of another base"),
        ({}, infinite, "NaN or infinite"),
        ({}, halved, "lacks lora_"),
    ],
)
def test_what_is_no_adapter_of_this_base_is_one_line(whole, config, tensors, message, tmp_path):
    bad = changed(whole.folder / "adapter", tmp_path / "bad", config, tensors)
    with pytest.raises(UserError, match=message):
        adapters.import_adapter(bad, whole.folder / "base", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_knows_its_base_by_its_values(whole, tmp_path):
    """One of the same shapes and other values is refused, both ways."""
    folder = whole.folder
    adapters.import_adapter(folder / "adapter", folder / "base", tmp_path / "ours")
    stores = checkpoint.open_leaves(folder / "base")
    other = {path: np.asarray(store.read().result()) for path, store in stores.items()}
    other["llm/layers/attention/value/kernel"] = other["llm/layers/attention/value/kernel"] + 1
    checkpoint.save_base(tmp_path / "other", rules.unflatten(other), {})
    with pytest.raises(UserError, match="of another base: llm/layers/attention/value/kernel"):
        adapters_out.merge(tmp_path / "ours", tmp_path / "merged", tmp_path / "other", "llama")
    adapters_out.export_adapter(tmp_path / "ours", tmp_path / "out", folder / "base")
    with pytest.raises(UserError, match="of another base: llm/layers/attention/value/kernel"):
        adapters.import_adapter(
            tmp_path / "out", tmp_path / "other", tmp_path / "again", 0, "llama"
        )


def test_adapters_among_the_tensors_of_a_training(whole, tmp_path):
    """NExT-GPT's file: PEFT 0.3's names behind its own, other tensors, no configuration."""
    held = load_file(whole.folder / "adapter" / "adapter_model.safetensors")
    legacy = {
        f"llama_model.{name.removesuffix('.weight')}.default.weight": torch.from_numpy(x)
        for name, x in held.items()
    }
    legacy["llama_proj.weight"] = torch.zeros(3, 3)
    torch.save(legacy, tmp_path / "pytorch_model.pt")
    base = whole.folder / "base"
    with pytest.raises(UserError, match="Say --alpha"):
        adapters.import_adapter(tmp_path / "pytorch_model.pt", base, tmp_path / "ours")
    adapters.import_adapter(tmp_path / "pytorch_model.pt", base, tmp_path / "ours", alpha=6)
    close(whole.call(tree(base, tmp_path / "ours")), whole.theirs)
    assert all(map(lora.is_adapter, rules.flatten(tree(tmp_path / "ours"))))


def test_alpha_is_said_once(whole, tmp_path):
    """By the configuration where there is one, beside a file as well; else by the flag."""
    source, base = whole.folder / "adapter", whole.folder / "base"
    for path in (source, source / "adapter_model.safetensors"):
        with pytest.raises(UserError, match=r"^--alpha: has no effect: .*json says lora_alpha 6\."):
            adapters.import_adapter(path, base, tmp_path / "out", alpha=6)
    bare = tmp_path / "bare"
    shutil.copytree(source, bare)
    (bare / "adapter_config.json").unlink()
    for path in (bare, bare / "adapter_model.safetensors"):
        for alpha in (0, -1, float("nan"), float("inf")):
            with pytest.raises(UserError, match=r"has no adapter_config\.json.*Say --alpha"):
                adapters.import_adapter(path, base, tmp_path / "out", alpha)
    adapters.import_adapter(bare, base, tmp_path / "out", alpha=6)
    close(whole.call(tree(base, tmp_path / "out")), whole.theirs)
    with pytest.raises(UserError, match="out: is there already"):
        adapters.import_adapter(source, base, tmp_path / "out")


def test_ranks_and_magnitudes_of_weights_without_a_configuration(whole, tmp_path):
    """Each module's scale is alpha over its own rank, as PEFT's rank_pattern has it."""
    held = load_file(whole.folder / "adapter" / "adapter_model.safetensors")
    cut = {
        name: np.ascontiguousarray(x[:2] if "lora_A" in name else x[:, :2])
        if "q_proj" in name
        else x
        for name, x in held.items()
    }
    (tmp_path / "bare").mkdir()
    save_file(cut, tmp_path / "bare" / "adapter_model.safetensors")
    base = whole.folder / "base"
    adapters.import_adapter(tmp_path / "bare", base, tmp_path / "ours", alpha=6)
    scale = {p: np.asarray(s[...]) for p, s in checkpoint.open_leaves(tmp_path / "ours").items()}
    np.testing.assert_allclose(scale["llm/layers/attention/query/lora_scale"], 6 / 2)
    np.testing.assert_allclose(scale["llm/layers/attention/value/lora_scale"], 6 / 4)
    for name, x in list(cut.items()):
        if "lora_B" in name:
            cut[name.replace("lora_B.weight", "lora_magnitude_vector")] = np.ones(len(x), "f4")
    save_file(cut, tmp_path / "bare" / "adapter_model.safetensors")
    assert "DoRA" in adapters.import_adapter(tmp_path / "bare", base, tmp_path / "dora", alpha=6)
