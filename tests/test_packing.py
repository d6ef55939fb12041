"""Packed rows teach what separate rows do: losses of every example, with and without neighbors."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reading
from flax import linen as nn

from xllm_jax.data.batching import conversation
from xllm_jax.data.batching.batch_format import BatchPlan
from xllm_jax.data.record import Mode
from xllm_jax.models import glm
from xllm_jax.models.xllm import XLLM
from xllm_jax.objectives import answer

WIDTH = 12


class Corner(nn.Module):
    """The first values of an item as its embeddings, so that every item has its own."""

    embeddings: int

    def __call__(self, values, lengths, train=False):
        flat = values.reshape(len(values), -1)[:, : self.embeddings * WIDTH]
        return flat.reshape(len(values), self.embeddings, WIDTH), lengths


class Through(nn.Module):
    """An interface that changes nothing."""

    def __call__(self, features, lengths, counts=None, train=False):
        return features, counts


@pytest.fixture(scope="module")
def model():
    """(a two-layer GLM with stand-in encoders, its parameters)."""
    sizes = {"image": 3, "video": 3, "speech": 8}
    llm = glm.ChatGLM(vocab=576, width=WIDTH, depth=2, heads=3, hidden=24)
    made = XLLM(
        networks={"llm": llm}
        | {f"{kind}_encoder": Corner(size) for kind, size in sizes.items()}
        | {f"{kind}_interface": Through() for kind in sizes},
        modalities=tuple((kind, f"{kind}_encoder", f"{kind}_interface") for kind in sizes),
    )
    params = {part: {} for part in made.networks}
    return made, params | {"llm": llm.init(jax.random.key(0), *llm.example())["params"]}


def losses(model, batch, members) -> dict[str, np.ndarray]:
    """{key: losses of the example's tokens}."""
    made, params = model

    @jax.jit
    def run(batch):
        states = made.hidden(params, batch)
        states = jnp.take_along_axis(states, batch.answer_index[..., None], axis=1)
        return answer.cross_entropy(made.logits(params, states), batch.targets)

    found = np.asarray(run(batch))
    segments = np.take_along_axis(batch.segments, batch.answer_index, axis=1)
    return {
        record.example.key: found[row, (segments[row] == segment) & (batch.weights[row] > 0)]
        for row, segment, record in members
    }


def test_packed_examples_have_the_losses_of_separate_ones(model, tmp_path):
    reading.write(tmp_path)
    pipeline = reading.pipeline(tmp_path)
    drawn = pipeline._steps[0]
    items = {"image": 3, "video": 4, "speech": 3}
    data = dataclasses.replace(pipeline.data, rows=3, length=144, items=items)
    form = conversation.Format(data)
    packed = form.plan(drawn, Mode())
    assert max(map(len, packed.rows)) > 2 and not packed.skipped
    placed, _ = form.prepare(drawn, Mode())
    found = []
    for plan in (packed, BatchPlan(tuple((one,) for one in placed))):
        batch, unread = form.fill(plan, slice(None), Mode())
        assert not unread
        found.append(losses(model, batch, plan.members(slice(None))))
    ours, alone = found
    assert ours.keys() == alone.keys() == {record.example.key for record in drawn}
    for key, expected in alone.items():
        assert len(expected)
        np.testing.assert_allclose(ours[key], expected, atol=2e-5, err_msg=key)
