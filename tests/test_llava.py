"""LLaVA 1.5's projector against transformers' class: numbers, names, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import published
import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from xllm_jax.assembly import parameters
from xllm_jax.convert import files, run_export, run_import
from xllm_jax.convert.sources import llava
from xllm_jax.core import checkpoint, rules
from xllm_jax.core.errors import UserError
from xllm_jax.models.mlp_interface import MLPInterface

READ, MADE = 12, 20
SIZES = dict(encoder_width=READ, hidden=MADE, llm_width=MADE)
LLM = LlamaConfig(hidden_size=MADE, num_attention_heads=2)
HF = LlavaConfig(vision_config=CLIPVisionConfig(hidden_size=READ), text_config=LLM)
OWN = dict(
    model_type="llava",
    mm_projector_type="mlp2x_gelu",
    mm_hidden_size=READ,
    hidden_size=MADE,
    mm_vision_tower="openai/clip-vit-large-patch14-336",
    mm_vision_select_feature="patch",
)
BESIDE = {
    "mm_projector": ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"),
    "multi_modal": ("language_model.model.norm.weight", "vision_tower.vision_model.post.weight"),
    "model.multi_modal": ("model.language_model.norm.weight", "lm_head.weight"),
}


@pytest.fixture(scope="module")
def peer():
    torch.manual_seed(0)
    return LlavaMultiModalProjector(HF)


def state(peer, names) -> dict[str, np.ndarray]:
    """The tensors of the torch class under the names of a layout."""
    return {
        f"{name}.{leaf}": getattr(layer, leaf).detach().numpy()
        for name, layer in zip(names, (peer.linear_1, peer.linear_2))
        for leaf in ("weight", "bias")
    }


def write(folder: Path, tensors, config=None) -> Path:
    folder.mkdir()
    if config:
        text = json.dumps(config) if isinstance(config, dict) else config.to_json_string()
        (folder / "config.json").write_text(text)
    published.write_safetensors(tensors, folder / "model.safetensors")
    return folder


def network(base: Path, **fields):
    leaves = {path: np.asarray(x[...]) for path, x in checkpoint.open_leaves(base).items()}
    return MLPInterface(**SIZES, **fields), rules.unflatten(leaves)["image_interface"]


@pytest.mark.parametrize("names", llava.LAYOUTS, ids=lambda names: names[0])
def test_every_layout_computes_what_transformers_does_and_goes_out_again(names, peer, tmp_path):
    """With what stands beside it in whole checkpoints; in and out bit by bit."""
    tensors = state(peer, names)
    start = max((s for s in BESIDE if s in names[0]), key=len)
    beside = {name: np.ones((3, 2), np.float32) for name in BESIDE[start]}
    config = OWN if "mm_projector" in names[0] else HF
    folder = write(tmp_path / "in", tensors | beside, config)
    done = run_import.run_import("llava", folder, tmp_path / "base")
    assert done.options["sizes"] == SIZES | {"skip": 1}
    assert done.dropped.keys() == beside.keys() and not done.fresh
    model, params = network(tmp_path / "base", skip=1)
    features = np.random.default_rng(0).normal(size=(2, 5, READ)).astype(np.float32)
    with torch.no_grad():
        expected = peer(torch.tensor(features)[:, 1:]).numpy()
    found, counts = jax.jit(model.apply)({"params": params}, features, np.array([5, 5]))
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_array_equal(counts, [4, 4])
    run_export.run_export("llava", tmp_path / "base", tmp_path / "out")
    back = files.open_checkpoint(tmp_path / "out")
    assert set(back) == tensors.keys()
    assert all(np.asarray(back[name]).tobytes() == x.tobytes() for name, x in tensors.items())


def test_the_published_file_alone_is_enough(peer, tmp_path):
    """`mm_projector.bin`; what it reads of the tower is then the stage's to say."""
    path = published.write_torch(state(peer, llava.PUBLISHED), tmp_path / "mm_projector.bin")
    done = run_import.run_import("llava", path, tmp_path / "base")
    assert done.options == {"names": list(llava.PUBLISHED), "sizes": SIZES}
    for skip in (0, 1):
        made = {"image_interface": MLPInterface(**SIZES, skip=skip)}
        parameters.check_fields(made, str(tmp_path / "base"), "image_interface")


def test_a_stage_that_keeps_the_class_token_does_not_load_it(peer, tmp_path):
    folder = write(tmp_path / "in", state(peer, llava.PUBLISHED), OWN)
    run_import.run_import("llava", folder, tmp_path / "base")
    made = {"image_interface": MLPInterface(**SIZES)}
    with pytest.raises(UserError, match=r"fields\.skip: is 0, and .* was made for 1.*skip=1"):
        parameters.check_fields(made, str(tmp_path / "base"), "image_interface")


@pytest.mark.parametrize(
    "said, skip",
    [
        (dict(mm_vision_select_feature="cls_patch"), 0),
        (dict(mm_vision_tower="google/siglip-so400m-patch14-384"), None),
        (dict(vision_feature_select_strategy="full"), 0),
        (dict(projector_hidden_act="relu"), 1),
    ],
)
def test_config_tells_what_no_shape_does(said, skip, peer, tmp_path):
    folder = write(tmp_path / "in", state(peer, llava.PUBLISHED), OWN | said)
    found = run_import.examine("llava", folder).options["sizes"]
    assert found.get("skip") == skip
    assert found.get("activation", "gelu") == said.get("projector_hidden_act", "gelu")


REFUSED = {
    "projector": (dict(mm_projector_type="linear"), r"config\.json: mm_projector_type: "),
    "no biases": (dict(multimodal_projector_bias=False), "multimodal_projector_bias: "),
    "activation": (dict(projector_hidden_act="of_mine"), "projector_hidden_act: "),
    "kind": (dict(model_type="llava_next"), "model_type: is 'llava_next'"),
    "width of the tower": (dict(mm_hidden_size=13), "mm_hidden_size: is 13, and the tensors"),
    "width of the LLM": (dict(text_config={"hidden_size": 8}), r"text_config\.hidden_size: is 8"),
    "feature": (dict(mm_vision_select_feature=["patch"]), "mm_vision_select_feature: "),
    "strategy": (dict(vision_feature_select_strategy="some"), "known are default, full"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_projector_is_not_is_refused_by_name(case, peer, tmp_path):
    said, message = REFUSED[case]
    folder = write(tmp_path / "in", state(peer, llava.PUBLISHED), OWN | said)
    with pytest.raises(UserError, match=message) as raised:
        run_import.run_import("llava", folder, tmp_path / "base")
    assert "\n" not in str(raised.value) and not (tmp_path / "base").exists()


def test_other_tensors_are_refused_by_name(peer, tmp_path):
    """One map; two projectors; a map too many; maps that do not meet; one that is missing."""
    tensors = state(peer, llava.PUBLISHED)
    first, second = (f"{name}.weight" for name in llava.PUBLISHED)
    bad = {
        "one linear map": {"model.mm_projector.weight": tensors[first]},
        "found 2": tensors | state(peer, llava.LAYOUTS[-1]),
        r"mm_projector\.4\.weight.*no row": tensors | {"model.mm_projector.4.weight": np.ones(3)},
        "image_newline": tensors | {"model.image_newline": np.ones(3)},
        r"mm_projector\.2\.weight.*shape": tensors | {second: tensors[second][:, 1:].copy()},
        r"mm_projector\.2\.weight.*no such": {n: x for n, x in tensors.items() if n != second},
    }
    for number, (message, held) in enumerate(bad.items()):
        folder = write(tmp_path / str(number), {n: np.float32(x) for n, x in held.items()})
        with pytest.raises(UserError, match=message):
            run_import.run_import("llava", folder, tmp_path / "base")
    with pytest.raises(UserError, match="looks like llava, not llama"):
        run_import.run_import("llama", write(tmp_path / "in", tensors), tmp_path / "base")
