"""X-LLM's own checkpoints: what each of its runs saves, their merge, and the way back."""

from __future__ import annotations

import functools
import json

import jax
import ml_dtypes
import numpy as np
import published
import pytest
from safetensors.torch import save_file

from xllm_jax.convert import export_tree, files, import_tree, run_export, run_import
from xllm_jax.convert.sources import xllm
from xllm_jax.convert.verify.vision_model import Reference
from xllm_jax.core import rules
from xllm_jax.core.errors import UserError

torch = pytest.importorskip("torch")


def write(state, path):
    """Writes a file, as X-LLM's runner saves it where it is a .pth."""
    saved = {name: published.to_torch(x) for name, x in state.items()}
    if path.suffix == ".pth":
        torch.save({"model": saved, "epoch": 4, "config": {}}, path)
    else:
        save_file(saved, str(path))
    return files.open_checkpoint(path)


@functools.cache
def plan_of(options: str):
    """The plan of options as they are written down; kept, since it traces the networks."""
    return xllm.plan(json.loads(options))


def load(checkpoint, size=""):
    """(options, tree of parts, report)."""
    written = json.dumps(xllm.options(checkpoint, size))
    options, plan = json.loads(written), plan_of(written)
    source = xllm.prepare(checkpoint, options)
    tree, report = import_tree(plan.table, source, plan.shapes, drop=plan.drop, fresh=plan.fresh)
    return options, tree, report


@pytest.fixture(scope="module")
def state() -> dict[str, np.ndarray]:
    """The whole model's state dict without its frozen encoders, from modules named as there.

    The Q-Former is BLIP-2's with the text branch cut away, the C-Former transformers' BertModel.
    """
    from transformers import BertConfig, BertModel

    bert = BertModel(
        BertConfig(
            vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=24, max_position_embeddings=10,
        )
    )  # fmt: skip
    parts = {
        "opt_proj": torch.nn.Linear(16, 20),
        "video_proj": torch.nn.Linear(16, 20),
        "pre_bert_proj": torch.nn.Linear(8, 16),
        "post_bert_proj": torch.nn.Linear(16, 20),
        "ln_vision": torch.nn.LayerNorm(12),
        "speech_bert_adaptor": bert,
        "Qformer.bert": q_former(),
    }
    tensors = {
        f"{part}.{name}": tensor
        for part, module in parts.items()
        for name, tensor in module.state_dict().items()
    }
    tensors |= {name: torch.zeros(1, 5, 16) for name in ("query_tokens", "video_query_tokens")}
    generator = np.random.default_rng(0)
    drawn = {
        name: generator.normal(size=tensor.shape).astype(np.float32)
        for name, tensor in tensors.items()
    }
    return drawn | {"Qformer.bert.embeddings.position_ids": np.arange(9)[None]}


def q_former():
    """Modules of LAVIS's `BertModel` with cross-attention in layers 0 and 2, text branch cut."""
    modules, linear = torch.nn.ModuleDict, torch.nn.Linear

    def end(inputs):
        return modules({"dense": linear(inputs, 16), "LayerNorm": torch.nn.LayerNorm(16)})

    def attention(memory):
        inner = {name: linear(memory, 16) for name in ("key", "value")}
        return modules({"self": modules({"query": linear(16, 16)} | inner), "output": end(16)})

    def layer(number):
        kinds = {"attention": attention(16)}
        kinds |= {} if number % 2 else {"crossattention": attention(12)}
        kinds["intermediate_query"] = modules({"dense": linear(16, 24)})
        return modules(kinds | {"output_query": end(24)})

    layers = torch.nn.ModuleList([layer(number) for number in range(3)])
    embeddings = modules({"LayerNorm": torch.nn.LayerNorm(16)})
    return modules({"embeddings": embeddings, "encoder": modules({"layer": layers})})


# What trains in each run, and so is in its file (the repository's `requires_grad` lines).
IMAGE_RUN = ("query_tokens", "ln_vision.", "Qformer.", "opt_proj.")
VIDEO_RUN = ("query_tokens", "opt_proj.", "video_query_tokens", "video_proj.")
SPEECH_RUN = ("query_tokens", "ln_vision.", "speech_bert", "pre_bert", "post_bert")
STAGE_3 = ("query_tokens", "opt_proj.", "video_query_tokens", "video_proj.", "post_bert")
MERGED = (*IMAGE_RUN, *VIDEO_RUN, *SPEECH_RUN)
BUFFER = "Qformer.bert.embeddings.position_ids"
UNUSED = {
    BUFFER,
    "speech_bert_adaptor.pooler.dense.weight",
    "speech_bert_adaptor.pooler.dense.bias",
    "speech_bert_adaptor.embeddings.word_embeddings.weight",
}
LEFT = {"query_tokens", "ln_vision.weight", "ln_vision.bias"}  # a speech run saves them, unused
RUNS = {
    "image": (IMAGE_RUN, {xllm.IMAGE: set()}, {BUFFER}),
    "video": (
        VIDEO_RUN,
        {xllm.IMAGE: {"norm", "qformer"}, xllm.VIDEO: {"norm", "qformer"}},
        {BUFFER},
    ),
    "speech": (SPEECH_RUN, {xllm.SPEECH: {"cif"}}, UNUSED | LEFT),
    "stage 3": (
        STAGE_3,
        {
            xllm.IMAGE: {"norm", "qformer"},
            xllm.VIDEO: {"norm", "qformer"},
            xllm.SPEECH: {"cif", "c_former"},
        },
        {BUFFER},
    ),
    "merged": (MERGED, {xllm.IMAGE: set(), xllm.VIDEO: set(), xllm.SPEECH: {"cif"}}, UNUSED),
}


def run_file(state, starts) -> dict[str, np.ndarray]:
    """What a run saves: its trained parameters and every buffer."""
    return {name: x for name, x in state.items() if name.startswith(starts) or name == BUFFER}


@pytest.mark.parametrize("run", RUNS)
def test_each_run_fills_what_it_trained_and_comes_back_bit_by_bit(run, state, tmp_path):
    starts, fresh, dropped = RUNS[run]
    form = ".pth" if run == "video" else ".safetensors"
    held = run_file(state, starts)
    checkpoint = write(held, tmp_path / f"checkpoint_4{form}")
    assert xllm.recognize(checkpoint)
    options, tree, report = load(checkpoint)
    assert tree.keys() == fresh.keys()
    left = {tuple(path.split("/")[:2]) for path in report.fresh}
    assert left == {(part, piece) for part, pieces in fresh.items() for piece in pieces}
    assert report.dropped.keys() == dropped
    back = xllm.restore(export_tree(plan_of(json.dumps(options)).table, tree), options)
    assert back.keys() == held.keys() - dropped
    assert all(back[name].tobytes() == held[name].tobytes() for name in back)


def test_the_command_takes_a_merged_file_there_and_back(state, tmp_path):
    held = run_file(state, MERGED)
    write(held, tmp_path / "merged.safetensors")
    run_import.run_import("xllm", tmp_path / "merged.safetensors", tmp_path / "base")
    run_export.run_export("xllm", tmp_path / "base", tmp_path / "back")
    back = files.open_checkpoint(tmp_path / "back")
    assert set(back) == held.keys() - UNUSED
    assert all(back[name].tobytes() == held[name].tobytes() for name in back)


def test_every_tensor_stands_where_it_belongs(state, tmp_path):
    options, tree, _ = load(write(run_file(state, MERGED), tmp_path / "merged.safetensors"))
    image, video, speech = (tree[part] for part in (xllm.IMAGE, xllm.VIDEO, xllm.SPEECH))
    np.testing.assert_array_equal(video["queries"], state["video_query_tokens"][0])
    np.testing.assert_array_equal(image["queries"], state["query_tokens"][0])
    np.testing.assert_array_equal(video["adapter"]["kernel"], state["video_proj.weight"].T)
    jax.tree.map(np.testing.assert_array_equal, video["qformer"], image["qformer"])
    kernel = speech["c_former"]["project"]["kernel"]
    np.testing.assert_array_equal(kernel, state["pre_bert_proj.weight"].T)
    sizes = options["sizes"][xllm.IMAGE]
    assert sizes == options["sizes"][xllm.VIDEO]
    told = dict(queries=5, depth=3, hidden=24, encoder_width=12, llm_width=20)
    assert told.items() <= sizes.items() and sizes["cross_attention_frequency"] == 2


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_stays_what_it_is(dtype, state, tmp_path):
    held = {name: x.astype(dtype) for name, x in run_file(state, MERGED).items()}
    _, tree, _ = load(write(held, tmp_path / "merged.safetensors"))
    assert {leaf.dtype for leaf in rules.flatten(tree).values()} == {np.dtype(dtype)}


def test_interfaces_that_differ_do_not_merge(state, tmp_path):
    options, tree, _ = load(write(run_file(state, MERGED), tmp_path / "merged.safetensors"))
    tree[xllm.VIDEO]["norm"]["scale"] = tree[xllm.VIDEO]["norm"]["scale"] + 1
    with pytest.raises(UserError, match="share it") as caught:
        dict(xllm.restore(export_tree(plan_of(json.dumps(options)).table, tree), options))
    assert caught.value.field == "ln_vision.weight"


LAYER = "Qformer.bert.encoder.layer.1"


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda s: s.pop("opt_proj.bias"), "opt_proj.bias"),
        (lambda s: s.pop("post_bert_proj.weight"), "post_bert_proj.weight"),
        (lambda s: s.pop("video_query_tokens"), "video_query_tokens"),
        (lambda s: s.pop("ln_vision.weight"), "ln_vision.weight"),
        (lambda s: s.pop(f"{LAYER}.output_query.dense.weight"), f"{LAYER}.output_query"),
        (lambda s: s.pop(f"{LAYER}.attention.self.query.weight"), f"{LAYER}.attention"),
        (lambda s: s.update(surplus=np.zeros(3)), "surplus"),
        (lambda s: s.update({"Qformer.cls.bias": np.zeros(3)}), "Qformer.cls.bias"),
        (lambda s: s.update({"post_bert_proj.bias": np.zeros(3)}), "post_bert_proj.bias"),
        (lambda s: s.update({xllm.FC: np.zeros((3, 3))}), xllm.FC),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name(change, name, state, tmp_path):
    held = run_file(state, MERGED)
    change(held)
    with pytest.raises(UserError) as caught:
        load(write(held, tmp_path / "merged.safetensors"))
    assert name in caught.value.field


@pytest.mark.golden
@pytest.mark.parametrize("run", ["image", "video"])
def test_recorded_files(run, golden):
    """An image run is BLIP-2's second stage; a video run has queries and adapters of both."""
    reference = Reference(golden / "vision")
    path = reference.weights / f"xllm_{run}_checkpoint_4.pth"
    checkpoint = files.open_checkpoint(path)
    _, image = reference.interface()
    options = xllm.options(checkpoint, "")
    fields = {"heads": reference.config["qformer"]["num_attention_heads"]}  # no shape tells it
    options["sizes"] = {part: sizes | fields for part, sizes in options["sizes"].items()}
    found = run_import.examine("xllm", path, options=options)
    tree = found.tree()
    if run == "image":
        jax.tree.map(np.testing.assert_array_equal, tree, {"image_interface": image})
        return
    for part, (queries, adapter) in {
        "video_interface": ("video_query_tokens", "video_proj"),
        "image_interface": ("query_tokens", "opt_proj"),
    }.items():
        own = tree.pop(part)
        np.testing.assert_array_equal(own["queries"], checkpoint[queries][0])
        np.testing.assert_array_equal(own["adapter"]["kernel"], checkpoint[f"{adapter}.weight"].T)
        np.testing.assert_array_equal(own["adapter"]["bias"], checkpoint[f"{adapter}.bias"])
        assert own.keys() == {"queries", "adapter"}
    assert not tree


def test_other_files_and_sizes_are_refused(state, tmp_path):
    checkpoint = write({"query_tokens": np.zeros(3)}, tmp_path / "other.safetensors")
    assert not xllm.recognize(checkpoint)
    with pytest.raises(UserError, match="no adapter of X-LLM"):
        xllm.options(checkpoint, "")
    checkpoint = write(run_file(state, IMAGE_RUN), tmp_path / "image.safetensors")
    with pytest.raises(UserError, match="unknown size"):
        xllm.options(checkpoint, "huge")
    with pytest.raises(UserError, match=r"needs|no such tensor"):
        load(checkpoint, "tiny")
    plan = xllm.plan(xllm.options(None, "tiny"))
    assert plan.shapes.keys() == set(xllm.PIECES)
