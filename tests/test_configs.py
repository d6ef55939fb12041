"""The stage configs: they build at both sizes, and say what the paper says."""

from __future__ import annotations

import importlib

import jax
import pytest

from xllm_jax.assembly import networks
from xllm_jax.assembly.system import System
from xllm_jax.core import mesh, rules

NAMES = (
    "stage1_speech",
    "stage1_image",
    "stage2_image",
    "stage2_video",
    "stage2_speech",
    "stage3_instruction",
    "stage_output_image",
    "stage_output_denoising",
)

# Paper, Table 7: peak, minimum, start of the warm-up, its updates, examples of an update
# (micro-batch x accumulation x GPUs).
PAPER = {
    "stage2_image": (3e-5, 1e-8, 1e-6, 6000, 4 * 16 * 8),
    "stage2_video": (1e-5, 1e-8, 1e-6, 200, 2 * 16 * 2),
    "stage2_speech": (1e-4, 1e-8, 1e-6, 6000, 4 * 16 * 8),
}
EPOCHS = {"stage2_image": (14e6, 5), "stage2_video": (7.7e3, 5), "stage2_speech": (1.37e6, 30)}


def config(name: str, size: str):
    """The Stage of a config file."""
    return importlib.import_module(f"xllm_jax.configs.{name}").get_config(size)


def count(tree) -> int:
    """Parameters of a tree of shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("size", ["real", "tiny"])
@pytest.mark.parametrize("name", NAMES)
def test_a_config_builds(name, size):
    stage = config(name, size)
    system = System.build(stage, mesh.make({}))
    shapes = system.tree
    assert rules.flatten(system.specs).keys() == system.shapes.keys()
    trainable, frozen = rules.split(stage.trainable, shapes)
    assert count(trainable) > 0
    assert "llm" not in trainable
    assert "vision_encoder" not in trainable
    assert count(trainable) + count(frozen) == count(shapes)


def test_the_output_stage_follows_next_gpt():
    """Section 4.1 and Table 7 of arXiv 2309.05519, and what its code adds (betas, clipping)."""
    stage = config("stage_output_image", "real")
    how = stage.optimizer
    assert (how.schedule, how.peak, how.minimum) == ("linear", 4e-4, 0.0)
    assert (how.b1, how.b2, how.eps, how.weight_decay, how.clip) == (0.9, 0.95, 1e-8, 0.001, 1.0)
    assert how.warmup_steps == stage.steps // 10
    assert stage.data.length == 512 and stage.data.signals["image"].count == 4
    system = System.build(stage, mesh.make({}))
    trainable = rules.split(stage.trainable, system.tree)[0]
    assert count(trainable) == 31_958_784 + 2 * 4 * 4096
    assert count(system.tree["text_encoder"]) == 123_060_480


def test_parameter_counts_are_the_published_ones():
    shapes = networks.shapes(networks.model(config("stage3_instruction", "real")))
    width, blocks, hidden = 1408, 39, 6144
    attention = 4 * width * width + 3 * width  # no key bias
    block = attention + 2 * width * hidden + hidden + width + 4 * width
    vit = blocks * block + 3 * 14 * 14 * width + width + width + 257 * width
    assert count(shapes["vision_encoder"]) == vit == 985_894_528
    width, layers = 4096, 28
    layer = 4 * width * width + 4 * width + 8 * width * width + 5 * width + 4 * width
    glm = layers * layer + 130_528 * width + 2 * width
    assert count(shapes["llm"]) == glm == 6_173_286_400
    assert round(count(shapes) / 1e9, 1) == 7.6


@pytest.mark.parametrize("name", PAPER)
def test_stage_two_follows_the_paper(name):
    stage = config(name, "real")
    given = stage.optimizer
    values = (
        given.peak,
        given.minimum,
        given.warmup_from,
        given.warmup_steps,
        given.accumulation * stage.data.examples,
    )
    assert values == PAPER[name]
    assert (given.schedule, given.b1, given.b2, given.weight_decay) == ("cosine", 0.9, 0.98, 0.05)
    samples, epochs = EPOCHS[name]
    updates = samples * epochs / (given.accumulation * stage.data.examples)
    assert stage.steps == pytest.approx(updates, rel=0.01)


def test_stage_one_speech_follows_the_paper():
    stage = config("stage1_speech", "real")
    given = stage.optimizer
    phases = (given.warmup_steps, given.hold_steps, given.decay_steps)
    assert (given.schedule, given.peak, given.weight_decay) == ("tri_stage", 3e-4, 0.01)
    assert phases == (24_000, 36_000, 120_000)
    assert stage.steps == sum(phases)
    assert stage.data.examples == 128


def test_stage_three_trains_the_adapters_alone():
    stage = config("stage3_instruction", "real")
    shapes = networks.shapes(networks.model(stage))
    paths = rules.flatten(rules.split(stage.trainable, shapes)[0])
    assert {path.split("/adapter/")[0] for path in paths} == {
        "image_interface",
        "video_interface",
        "speech_interface",
    }
    given = stage.optimizer
    assert (given.schedule, given.peak) == ("constant", 1e-6)
    assert given.accumulation * stage.data.examples == 2 * 16 * 2
