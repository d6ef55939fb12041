"""The Q-Former, its interfaces and its checkpoints, against transformers."""

from __future__ import annotations

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xllm_jax.convert import export_tree, import_tree, run_import
from xllm_jax.convert.files import open_checkpoint
from xllm_jax.convert.sizes import shapes_of
from xllm_jax.convert.sources import blip2
from xllm_jax.convert.verify.vision_model import (
    STAGE1,
    STAGE2,
    Reference,
    blip2_options,
    contrast_fields,
    contrast_table,
    float32,
    images,
    interface_fields,
    vision_fields,
)
from xllm_jax.core import rules
from xllm_jax.models import blip2_pretraining, interfaces
from xllm_jax.models.blip2_pretraining import ContrastModel
from xllm_jax.models.interfaces import QFormerInterface
from xllm_jax.models.qformer import QFormer
from xllm_jax.models.vit import VisionTransformer
from xllm_jax.objectives.blip2_pretraining import similarities


def _pairs(model, params, features, ids, mask):
    """Unit vectors of images and texts, and the matching logits of the pairs."""

    @jax.jit
    def run(params):
        variables = {"params": params | {"temperature": jnp.float32(0.07)}}
        image = model.apply(variables, features, method="normalize")
        _, units, _ = model.apply(variables, image, method="image")
        _, text_units = model.apply(variables, ids, mask, method="text")
        _, per_query = model.apply(variables, image, ids, mask, method="match")
        return units, text_units[:, 0], per_query

    return run(params)


DECODER = "Qformer.cls.predictions.decoder"
VISION = "visual_encoder"


@pytest.mark.golden
def test_files_come_back_as_they_were(golden):
    """Every published layout of the recording, read by its plan and written again."""
    reference = Reference(golden / "vision")
    vocabulary = open_checkpoint(reference.weights / STAGE1).header(blip2.WORDS).shape[0]
    stage1 = contrast_fields(reference.config, vocabulary)
    stage2, vision = interface_fields(reference.config), vision_fields(reference.config)
    positions = "Qformer.bert.embeddings.position_ids"
    tied = {f"{DECODER}.weight", f"{DECODER}.bias"}
    trees = {}
    for file, options, left in (
        (STAGE1, blip2_options(stage1, text=True), {positions} | tied),
        ("blip2_pretrained_with_vit.pth", blip2_options(stage1, text=True, vision=vision), None),
        (STAGE2, blip2_options(stage2), {positions}),
    ):
        found = run_import.examine("blip2", reference.weights / file, options=options)
        trees[file], source = found.tree(), found.opened
        back = export_tree(found.plan.table, trees[file])
        for name, tensor in back.items():
            np.testing.assert_array_equal(tensor, source[name], err_msg=name)
        rest = source.keys() - back.keys()
        if left is None:  # the vision encoder's last block, norm and head
            rest, left = {n for n in rest if not n.startswith(VISION)}, {positions} | tied
        assert rest == left
    whole = float32(trees["blip2_pretrained_with_vit.pth"])
    jax.tree.map(np.testing.assert_array_equal, whole["image_interface"], reference.contrast[1])
    jax.tree.map(np.testing.assert_array_equal, whole["vision_encoder"], reference.vision[1])
    options = blip2_options(stage2) | {"adapter": False}
    found = run_import.examine("blip2", reference.weights / STAGE1, options=options)
    adapter = ("image_interface/adapter/bias", "image_interface/adapter/kernel")
    assert found.report.fresh == adapter
    text = r"qformer/.*/(words|positions|text_.*)|(image|text)_projection|match_head|language_head"
    start = rules.flatten(found.tree()["image_interface"])
    stage1 = rules.flatten(trees[STAGE1]["image_interface"])
    kept = {p for p in stage1 if not re.match(rf"({text})|temperature", p)}
    assert start.keys() == kept
    assert all(np.array_equal(start[path], stage1[path]) for path in kept)


@pytest.mark.golden
def test_initialization_from_bert(golden):
    expected = json.loads((golden / "vision/cases_bert_init.json").read_text())
    source = open_checkpoint(golden / "vision/weights/bert-base-uncased")
    reference = Reference(golden / "vision")
    model = ContrastModel(**contrast_fields(reference.config, expected["tokenizer_len"]))
    fresh = float32(jax.jit(model.init)(jax.random.key(0), *model.example())["params"])
    tensors = export_tree(contrast_table(model), blip2.from_bert(source, model, fresh))
    published = {
        name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): source[name]
        for name in source
    }
    again = export_tree(contrast_table(model), blip2.from_bert(published, model, fresh))
    jax.tree.map(np.testing.assert_array_equal, again, tensors)
    before = export_tree(contrast_table(model), fresh)
    bert = lambda name: source[name.removeprefix("Qformer.")]  # noqa: E731
    for name in expected["from_bert"]:
        np.testing.assert_array_equal(tensors[name], bert(name), err_msg=name)
    for name in expected["copied_from_text_ffn"]:
        np.testing.assert_array_equal(tensors[name], bert(name.replace("_query", "")))
    tied = "Qformer.cls.predictions.decoder."
    resized = [n for n in expected["resized_first_rows_from_bert"] if not n.startswith(tied)]
    for name in resized:
        rows = len(bert(name))
        np.testing.assert_array_equal(tensors[name][:rows], bert(name))
        np.testing.assert_array_equal(tensors[name][rows:], before[name][rows:])
    random = [name for name in expected["random_or_zero"] if name in tensors]
    named = {*expected["from_bert"], *expected["copied_from_text_ffn"], *resized, *random}
    for name in tensors.keys() - named | set(random):
        np.testing.assert_array_equal(tensors[name], before[name], err_msg=name)
    assert {name.split(".")[0] for name in tensors.keys() - named} == {
        *("query_tokens", "ln_vision", "vision_proj", "text_proj", "itm_head", "temp")
    }


def test_equals_transformers_with_random_weights():
    """BLIP-2's retrieval model of transformers, weights perturbed, at depth 3 (a tail group)."""
    torch = pytest.importorskip("torch")
    from transformers import Blip2Config, Blip2ForImageTextRetrieval

    torch.manual_seed(0)
    config = Blip2Config(
        vision_config=dict(
            hidden_size=24, num_hidden_layers=2, num_attention_heads=3, image_size=16, patch_size=4,
            intermediate_size=40,
        ),
        qformer_config=dict(
            hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
            encoder_hidden_size=24, cross_attention_frequency=2, vocab_size=50,
            max_position_embeddings=20, use_qformer_text_input=True,
        ),
        num_query_tokens=5,
        image_text_hidden_size=16,
    )  # fmt: skip
    peer = Blip2ForImageTextRetrieval(config).eval()
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
            if name.endswith("qkv.bias"):
                parameter[24:48] = 0
    source = {name: tensor.numpy() for name, tensor in peer.state_dict().items()}
    seen = dict(
        image_size=16, patch=4, width=24, depth=2, heads=3, hidden=40, epsilon=1e-6
    )  # fmt: skip
    vision = VisionTransformer(**seen)
    fields = dict(
        queries=5, width=32, depth=3, heads=4, hidden=48, vocabulary=50, positions=20, embed=16,
        encoder_width=24, norm_epsilon=1e-6,
    )  # fmt: skip
    model = ContrastModel(**fields)
    plan = blip2.plan(blip2_options(fields, "hf", text=True, vision=seen))
    tree, _ = import_tree(plan.table, source, plan.shapes, drop=plan.drop, fresh=plan.fresh)
    params, vision_params = tree["image_interface"], tree["vision_encoder"]
    pixels = torch.randn(3, 3, 16, 16)
    ids, mask = torch.randint(1, 50, (3, 7)), torch.arange(7)[None] < torch.tensor([[7], [4], [2]])
    inputs = dict(pixel_values=pixels, input_ids=ids, attention_mask=mask.long())
    with torch.no_grad():
        match = peer(**inputs, use_image_text_matching_head=True).logits_per_image
        align = peer(**inputs, use_image_text_matching_head=False).logits_per_image
    ids, mask = ids.numpy(), mask.numpy()
    features, _ = jax.jit(vision.apply)({"params": vision_params}, images(pixels.numpy()))
    units, text_units, per_query = _pairs(model, params, features, ids, mask)
    to_text, _ = similarities(units, text_units, 1.0)
    np.testing.assert_allclose(to_text, align.numpy(), atol=2e-5)
    np.testing.assert_allclose(per_query.mean(1), match.numpy(), atol=5e-5)


def test_cached_captions_equal_joint_ones_and_do_not_look_ahead():
    model = ContrastModel(**blip2_pretraining.SIZES["tiny"] | {"depth": 3})
    variables = jax.jit(model.init)(jax.random.key(0), *model.example())
    image = jax.random.normal(jax.random.key(1), (2, 5, model.encoder_width))
    ids = np.arange(14).reshape(2, 7)
    mask = np.arange(7) < np.array([[7], [4]])
    caption = jax.jit(functools.partial(model.apply, method="caption"))
    _, _, cache = jax.jit(functools.partial(model.apply, method="image"))(variables, image)
    _, cached = caption(variables, ids, mask, cache)
    jointly = jax.jit(functools.partial(model.apply, method="caption_jointly"))
    _, joint = jointly(variables, image, ids, mask)
    np.testing.assert_allclose(cached, joint, atol=1e-5)
    changed = ids.copy()
    changed[:, 3:] += 30
    _, other = caption(variables, changed, mask, cache)
    np.testing.assert_allclose(other[:, :3], cached[:, :3], atol=1e-6)
    assert np.abs(other[:, 3:] - cached[:, 3:]).max() > 1e-3


def test_interface_masks_scan_dropout_and_half_precision():
    sizes = interfaces.SIZES["tiny"] | {"llm_width": 48}
    model = QFormerInterface(**sizes)
    features = jax.random.normal(jax.random.key(1), (3, 9, model.encoder_width))
    variables = jax.jit(model.init)(jax.random.key(0), features, jnp.array([9, 9, 9]))
    run = jax.jit(model.apply)
    value, counts = run(variables, features, jnp.array([9, 4, 0]))
    queries = sizes["queries"]
    np.testing.assert_array_equal(counts, [queries, queries, 0])
    assert value.shape == (3, queries, 48) and np.all(np.isfinite(value))
    short, _ = run(variables, features[1:2, :4], jnp.array([4]))
    np.testing.assert_allclose(value[1:2], short, atol=1e-5)
    other = QFormerInterface(**sizes, remat="all", unroll=2)
    same, _ = jax.jit(other.apply)(variables, features, jnp.array([9, 4, 0]))
    np.testing.assert_allclose(same, value, atol=1e-5)
    dropping = QFormerInterface(**sizes | {"dropout": 0.1})
    train = jax.jit(functools.partial(dropping.apply, train=True))
    rngs = {"dropout": jax.random.key(3)}
    noisy, _ = train(variables, features, jnp.array([9, 4, 0]), rngs=rngs)
    assert np.abs(noisy - value).max() > 1e-2
    half = QFormerInterface(**sizes, dtype=jnp.bfloat16)
    near, _ = jax.jit(half.apply)(variables, features, jnp.array([9, 9, 9]))
    full, _ = run(variables, features, jnp.array([9, 9, 9]))
    assert near.dtype == jnp.bfloat16
    distance = np.linalg.norm(near - full) / np.linalg.norm(full)
    print(f"Q-Former tiny, bfloat16 against float32: relative distance {distance:.2e}")
    assert distance < 2e-2


def test_every_leaf_has_a_sharding_row_and_the_real_sizes_are_published_ones():
    for module, model in (
        (blip2_pretraining, ContrastModel(**blip2_pretraining.SIZES["tiny"] | {"depth": 3})),
        (interfaces, QFormerInterface(**interfaces.SIZES["tiny"])),
    ):
        shapes = shapes_of(model)
        specs = rules.flatten(rules.assign(module.SHARDING, shapes, total=False))
        for path, leaf in rules.flatten(shapes).items():
            assert len(specs[path]) <= len(leaf.shape), path
            if leaf.size > 1e4:
                assert any(specs[path]), f"{path} is large and not sharded"
    real = QFormerInterface(**interfaces.SIZES["blip2"])
    count = {path: leaf.size for path, leaf in rules.flatten(shapes_of(real)).items()}
    # transformers' Blip2QFormerModel at its default sizes, its own 'layernorm' included.
    qformer = sum(size for path, size in count.items() if path.startswith("qformer/"))
    assert qformer == _published_qformer()
    assert sum(count.values()) == qformer + 32 * 768 + 2 * 1408 + 769 * 4096


def _published_qformer() -> int:
    torch = pytest.importorskip("torch")
    from transformers import Blip2QFormerConfig, Blip2QFormerModel

    with torch.device("meta"):
        peer = Blip2QFormerModel(Blip2QFormerConfig())
    return sum(parameter.numel() for parameter in peer.parameters())


def test_text_needs_a_text_branch():
    with pytest.raises(ValueError, match="vocabulary"):
        QFormer(width=8, depth=2, heads=2, hidden=8).init(
            jax.random.key(0), ids=jnp.zeros((1, 2), jnp.int32), text_mask=jnp.ones((1, 2), bool)
        )
