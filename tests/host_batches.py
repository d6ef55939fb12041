"""Steps of a shallow X-LLM on rows that hold text alone, and rows that hold video and speech."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from configs import stage3_instruction
from xllm_jax import build, train
from xllm_jax.core import mesh
from xllm_jax.core.batch import Batch, zeros
from xllm_jax.data import media

ROWS, LENGTH, ANSWERS = 2, 64, 8
SHALLOW = {
    "vit.VisionTransformer": {"depth": 1},
    "interfaces.QFormerInterface": {"depth": 2},
    "glm.ChatGLM": {"depth": 1},
    "conformer.SpeechEncoder": {"depth": 3, "pools": (1, 2)},
}


def stage():
    """Stage 3 with all modalities, as shallow as they go."""
    made = stage3_instruction.get_config("tiny")
    made.unroll, made.compute, made.frozen, made.init = 1, "float32", "float32", {}
    for part in made.parts.values():
        part.fields |= SHALLOW.get(part.network, {})
    items = {"image": 1, "video": 2, "speech": 1}
    made.data = dataclasses.replace(
        made.data, rows=ROWS, length=LENGTH, answers=ANSWERS, items=items, frames=(64,)
    )
    return made


def batch(made) -> Batch:
    """Two rows: the first text alone, the second a video of two frames and a spoken sentence."""
    rng = np.random.default_rng(0)
    data = made.data
    shapes = {n: (count, media.form(n, data).shape) for n, count in data.items.items()}
    found = jax.tree.map(np.array, zeros(ROWS, LENGTH, ANSWERS, shapes))
    found.ids[:] = rng.integers(20, 400, found.ids.shape)
    found.positions[..., 0] = np.arange(LENGTH)
    found.segments[:], found.context[:, : LENGTH - ANSWERS] = 1, True
    found.answer_index[:] = np.arange(LENGTH - ANSWERS, LENGTH)
    found.targets[:] = rng.integers(20, 400, found.targets.shape)
    found.weights[:] = 1
    for name, steps in (("video", 1), ("speech", 64)):
        item = found.media[name]
        item.values[1] = rng.normal(size=item.values.shape[1:])
        item.lengths[1] = steps
        item.counts[1] = 4
        item.index[1, 8 + 4 * (name == "speech") :][:4] = np.arange(4)
    return found


def train_steps(made, rows: slice, count: int) -> list[dict[str, float]]:
    """Metrics of `count` steps on this host's rows."""
    xllm, device_mesh = build.model(made), mesh.make({"data": -1})
    state, optimizer, _ = train.initial_state(made, xllm, device_mesh)
    step = train.jitted(made, xllm, optimizer, state)
    own, found = jax.tree.map(lambda x: x[rows], batch(made)), []
    with jax.set_mesh(device_mesh):
        for _ in range(count):
            state, metrics = step(state, mesh.to_global(device_mesh, own))
            found.append({name: float(value) for name, value in metrics.items()})
    return found


def train_on_share(index: int, count: int) -> list[dict[str, float]]:
    """Host `index` of `count` fills its share of the two rows."""
    each = ROWS // count
    return train_steps(stage(), slice(index * each, (index + 1) * each), 3)
