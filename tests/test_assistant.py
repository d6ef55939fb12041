"""The assistant: one way to an answer, and files that are encoded once."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
import small_stage

from xllm_jax.assembly import networks
from xllm_jax.core.stage import Part
from xllm_jax.data.example import Example
from xllm_jax.inference import assistant, decoding, replies
from xllm_jax.inference.load_run import Restored

PREFIX = {"length": 4, "depth": 2, "width": 32, "heads": 2}
ASKED = Example("asked", (), "图中有什么？")


@pytest.fixture(scope="module")
def prefixed() -> Restored:
    """A small LLM with a learned prefix, drawn so that answers vary."""
    parts = {
        "llm": Part("glm.ChatGLM", "tiny", small_stage.GLM | {"alpha": 0.2}),
        "llm_prefix": Part("glm_prefix.Prefix", "tiny", dict(PREFIX)),
    }
    stage = small_stage.stage(parts=parts)
    model = networks.model(stage)
    rng = np.random.default_rng(3)
    params = jax.tree.map(
        lambda x: rng.normal(scale=0.4, size=x.shape).astype(np.float32), networks.shapes(model)
    )
    return Restored(model, params, stage)


@pytest.mark.parametrize("options", [{}, {"beams": 3}], ids=["greedy", "beam"])
def test_an_answer_continues_behind_the_prefix(prefixed, options):
    """It is that of `generate`, and another than without the prefix."""
    model = assistant.Assistant(prefixed, rows=2, max_tokens=8)
    how = model.decoding(**options)
    words = model.family.tokenizer.encode("问：图中有什么？\n答：")
    batch = decoding.prompt_batch([model.family.row(words)] * 2, model.family.pad)
    tokens = np.asarray(decoding.generate(prefixed.model, prefixed.params, batch, how).tokens)
    tokens = tokens[:, 0] if "beams" in options else tokens
    expected = model.family.finish(
        model.family.tokenizer.decode(replies.answer_tokens(tokens[0].tolist(), model.family))
    )
    assert model.answers([ASKED], how) == [expected]
    alone = {"llm": prefixed.model.networks["llm"]}
    without = dataclasses.replace(
        prefixed, model=dataclasses.replace(prefixed.model, networks=alone)
    )
    other = assistant.Assistant(without, rows=2, max_tokens=8)
    assert other.answers([ASKED], how) != [expected]
