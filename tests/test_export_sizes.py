"""Exports of bases that no conversion made: their sizes come from their parameters."""

from __future__ import annotations

import numpy as np
import pytest

from xllm_jax.convert import files, run_export, run_import
from xllm_jax.core import checkpoint, rules
from xllm_jax.core.errors import UserError
from xllm_jax.models import asr, blip2_pretraining, conformer, interfaces

TOWER = dict(image_size=24, patch=8, width=24, depth=3, heads=3, hidden=40)
QFORMER = dict(width=24, depth=5, heads=3, hidden=40, cross_attention_frequency=2)
TEXT = dict(vocabulary=19, positions=7, width=24, depth=2, heads=2, hidden=40)
BERT = dict(TEXT, types=3)
IMAGE = interfaces.SIZES["tiny"] | QFORMER | dict(queries=5, encoder_width=24, llm_width=10)
STAGE1 = blip2_pretraining.SIZES["tiny"] | QFORMER
STAGE1 |= dict(queries=5, encoder_width=24, vocabulary=19, positions=7, embed=9)
SPEECH = dict(
    max_tokens=9, width=24, depth=2, heads=2, hidden=40, positions=9, encoder_width=12, llm_width=10
)
ENCODER = conformer.SIZES["tiny"] | dict(width=24, heads=3, hidden=40, kernel=5, channels=6)
ENCODER |= dict(depth=5, pools=[1, 3])
DECODER = {k: asr.SIZES["tiny"][k] for k in ("width", "hidden", "heads", "self_blocks", "vocab")}
DECODER |= dict(width=24, hidden=40, heads=2, self_blocks=3, vocab=13)
WHISPER = dict(bins=5, width=24, depth=3, heads=3, hidden=40, positions=9)
CAUSAL = dict(vocab=21, width=24, depth=3, heads=3, hidden=40, key_heads=1)
MARKED = dict(mark="vision_model.pre_layrnorm.weight")
PIECES = {
    "image_interface": ["adapter", "norm", "qformer"],
    "video_interface": ["adapter"],
    "speech_interface": ["c_former/project", "c_former/bert", "adapter"],
}
CASES = {
    "chatglm": ("chatglm", dict(vocab=21, width=24, depth=3, heads=3, hidden=40)),
    "llama": ("llama", CAUSAL),
    "qwen2": ("llama", CAUSAL | dict(qkv_bias=True, tied=True)),
    "qwen3": ("llama", CAUSAL | dict(head_norms=True, head_dim=6)),
    "glm4": ("llama", CAUSAL | dict(qkv_bias=True, sandwich=True, rotary_share=0.5)),
    "prefix": ("chatglm_prefix", dict(length=4, depth=3, width=24, heads=3, projected=False)),
    "eva_vit": ("eva_vit", TOWER),
    "bert": ("bert", BERT | dict(prefix="bert.", gamma=False)),
    "bert_qformer": ("bert_qformer", dict(interface=STAGE1, added=1, seed=0, gamma=False)),
    "blip2, stage 2": (
        "blip2",
        dict(kind="lavis", text=False, adapter=True, vision=None, interface=IMAGE),
    ),
    "blip2, stage 1": (
        "blip2",
        dict(kind="lavis", text=True, adapter=False, vision=None, interface=STAGE1),
    ),
    "blip2, shorter than a group": (
        "blip2",
        dict(
            kind="lavis",
            text=False,
            adapter=True,
            vision=None,
            interface=IMAGE | dict(depth=2, cross_attention_frequency=3),
        ),
    ),
    "clip_vision": ("clip_vision", MARKED | dict(sizes=TOWER)),
    "clip": (
        "clip",
        MARKED
        | dict(sizes=dict(vision_fields=TOWER, text_fields=TEXT | dict(end=None), shared=11)),
    ),
    "siglip": ("siglip", dict(prefix="vision_model.", sizes=TOWER)),
    "llava": (
        "llava",
        dict(
            names=["model.mm_projector.0", "model.mm_projector.2"],
            sizes=dict(encoder_width=12, hidden=20, llm_width=10),
        ),
    ),
    "whisper": ("whisper", dict(prefix="model.encoder.", sizes=WHISPER)),
    "cif_asr": ("cif_asr", dict(encoder=ENCODER, decoder=DECODER, kernel=3)),
    "cif_asr, dense": ("cif_asr", dict(encoder=ENCODER, decoder=DECODER, kernel=0)),
    "xllm": (
        "xllm",
        dict(
            pieces=PIECES,
            sizes=dict(image_interface=IMAGE, video_interface=IMAGE, speech_interface=SPEECH),
        ),
    ),
}


def drawn(plan):
    """{path: float32 array} of every leaf that the table fills."""
    generator, filled = np.random.default_rng(0), {row.target for row in plan.table}
    flat = rules.flatten(plan.shapes)
    params = {p: generator.normal(size=x.shape).astype(np.float32) for p, x in flat.items()}
    params = {path: leaf for path, leaf in params.items() if path in filled}
    for path, leaf in params.items():  # X-LLM's file holds one Q-Former for image and video
        other = path.replace("video_interface", "image_interface")
        params[path] = params.get(other, leaf) if "/adapter" not in path else leaf
    for path in params:  # as a Q-Former starts from BERT
        words = path.replace("query_feed_forward", "text_feed_forward")
        if path.startswith("qformer/"):
            params[path] = params[words]
    return params


@pytest.mark.parametrize("case", CASES)
def test_a_base_of_any_size_goes_out_without_a_record(case, tmp_path):
    """As the table of the true sizes writes it, tensor by tensor."""
    source, options = CASES[case]
    module = run_import.source_named(source)
    plan = module.plan(options)
    params = drawn(plan)
    checkpoint.save_base(tmp_path / "base", rules.unflatten(params), {})
    run_export.run_export(source, tmp_path / "base", tmp_path / "out")
    written = files.open_checkpoint(tmp_path / "out")
    leaves = checkpoint.open_leaves(tmp_path / "base")
    expected = run_export.Exported(plan, leaves, tmp_path)
    restore = getattr(module, "restore", None)
    expected = restore(expected, options) if restore else expected
    assert set(written) == set(expected)
    for name in written:
        assert written[name].tobytes() == np.ascontiguousarray(expected[name]).tobytes(), name
        assert written[name].shape == expected[name].shape, name


def test_heads_by_hand(tmp_path):
    """The fused projection of two heads at width 8, row by row."""
    options = dict(vocab=5, width=8, depth=2, heads=2, hidden=7)
    params = drawn(run_import.source_named("chatglm").plan(options))
    checkpoint.save_base(tmp_path / "base", rules.unflatten(params), {})
    run_export.run_export("chatglm", tmp_path / "base", tmp_path / "out")
    fused = files.open_checkpoint(tmp_path / "out")[
        "transformer.layers.1.attention.query_key_value.weight"
    ]
    kernel = params["llm/layers/attention/qkv/kernel"][1]  # [width, 3, heads, head width]
    rows = [kernel[:, part, head, k] for head in range(2) for part in range(3) for k in range(4)]
    np.testing.assert_array_equal(fused, np.stack(rows))


def test_another_size_or_kind_than_the_base_has_is_refused(tmp_path):
    params = drawn(run_import.source_named("eva_vit").plan(TOWER))
    checkpoint.save_base(tmp_path / "base", rules.unflatten(params), {})
    with pytest.raises(UserError, match=r"--size: tiny has depth 4, and .*base has 3"):
        run_export.run_export("eva_vit", tmp_path / "base", tmp_path / "out", "tiny")
    sources = [name for name, m in run_import.sources().items() if hasattr(m, "options_of")]
    # The world's bases are of other sources, and those of diffusers' parts have a record each.
    parts = {f"stable_diffusion_{part}" for part in ("text", "unet", "vae")}
    assert run_import.sources().keys() - sources == {"world", *parts}
    for source in set(sources) - {"eva_vit"}:
        with pytest.raises(UserError, match="the base lacks this parameter"):
            run_export.run_export(source, tmp_path / "base", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_what_stands_beside_a_part_does_not_count(tmp_path):
    """A run's result holds other parts, too."""
    params = drawn(run_import.source_named("clip_vision").plan(MARKED | dict(sizes=TOWER)))
    params["llm/layers/attention/qkv/kernel"] = np.zeros((2, 6, 3, 2, 3), np.float32)
    checkpoint.save_base(tmp_path / "base", rules.unflatten(params), {})
    names = run_export.run_export("clip_vision", tmp_path / "base", tmp_path / "out")
    assert names == ["model.safetensors"]
    assert all("llm" not in name for name in files.open_checkpoint(tmp_path / "out"))
