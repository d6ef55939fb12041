"""A run that understands and a run that draws, joined beside the LLM that both left alone."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
import small_outputs
import small_runs
import small_stage

from xllm_jax.assembly import networks
from xllm_jax.core import base_description, checkpoint
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Part
from xllm_jax.data.example import Example
from xllm_jax.inference.assistant import Assistant
from xllm_jax.inference.load_run import load_run, stage_of

SPARE = {"llm_width": 32, "width": 16, "queries": 2, "output_width": 4}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """`runs/drawn` answers with pictures, `runs/said` has a part that `drawn` lacks."""
    folder = tmp_path_factory.mktemp("home")
    drawn = small_outputs.stage(folder)
    small_runs.write_run(drawn, folder / "runs/drawn", ("signal_tokens", "image_projection"))
    base = base_description.base_about(folder / "runs/drawn/final")["base"]
    write(folder, "said", base)
    return folder


def write(home, name, base, **changes):
    """A finished run without outputs beside the LLM of `drawn`."""
    stage = small_stage.stage(init={"llm": "bases/llm"}, trainable=("spare/.*",), **changes)
    stage.parts = stage.parts | {
        "spare": Part("outputs.projection.TransformerProjection", "tiny", dict(SPARE))
    }

    shapes = networks.shapes(networks.model(stage))["spare"]
    rng = np.random.default_rng(3)

    spare = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
    about = {"stage": dataclasses.asdict(stage), "base": base}
    checkpoint.save_base(home / "runs" / name / "final", {"spare": spare}, about)


def test_joined_runs_have_the_parts_of_both(home):
    restored = load_run(home / "runs/said", outputs=home / "runs/drawn")
    alone = load_run(home / "runs/drawn")
    wanted = {"llm", "spare", "signal_tokens", "image_projection"}
    assert restored.params.keys() == restored.model.networks.keys() == wanted
    for part in ("signal_tokens", "image_projection", "llm"):
        for ours, theirs in zip(leaves(restored.params[part]), leaves(alone.params[part])):
            np.testing.assert_array_equal(ours, theirs)
    assert restored.stage.outputs.keys() == {"image"}


def leaves(tree):
    """The arrays of a tree, in order."""

    return list(map(np.asarray, jax.tree.leaves(tree)))


def test_they_answer_with_the_pictures_of_the_run_that_draws(home):
    example = Example("a", instruction="画一个红色的圆")
    replies = [
        Assistant(load_run(home / "runs" / name, outputs=outputs), max_tokens=6).replies([example])
        for name, outputs in (("said", home / "runs/drawn"), ("drawn", ""))
    ]
    (ours,), (theirs,) = replies
    pictures = [[p for p in one.pieces if not isinstance(p, str)] for one in (ours, theirs)]
    assert len(pictures[0]) == len(pictures[1])
    for one, other in zip(*pictures):
        np.testing.assert_array_equal(one.embeddings, other.embeddings)
    assert [p for p in ours.pieces if isinstance(p, str)] == [
        p for p in theirs.pieces if isinstance(p, str)
    ]


@pytest.mark.parametrize(
    ("first", "outputs", "what"),
    [
        ("said", "said", "hold text alone"),
        ("drawn", "drawn", "answers with image already"),
        ("other", "drawn", "beside another LLM"),
        ("wide", "drawn", "beside another LLM"),
    ],
)
def test_runs_that_cannot_be_joined_are_refused(home, first, outputs, what):
    if first == "other":
        base = base_description.base_about(home / "runs/drawn/final")["base"]
        write(home, first, {"llm": base["llm"][:-4] + "0000"})
    if first == "wide":
        write(home, first, {}, parts={"llm": Part("glm.ChatGLM", "tiny", {"vocab": 580})})
    with pytest.raises(UserError, match=what) as caught:
        stage_of(home / "runs" / first, home / "runs" / outputs)
    assert f"--outputs={home / 'runs' / outputs}" in str(caught.value)
