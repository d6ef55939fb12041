"""Steps of a shallow X-LLM on rows that hold text alone, and rows that hold video and speech."""

from __future__ import annotations

import dataclasses
import zlib

import jax
import numpy as np

from xllm_jax.assembly.system import System
from xllm_jax.configs import stage3_instruction
from xllm_jax.core import mesh, rules
from xllm_jax.core.batch import ConversationBatch, zeros
from xllm_jax.core.stage import Optimizer
from xllm_jax.data.media import modalities
from xllm_jax.training import divergence, telemetry
from xllm_jax.training.step import TrainState
from xllm_jax.training.trainer import Trainer

ROWS, LENGTH, ANSWERS = 2, 64, 8
SHALLOW = {
    "vit.VisionTransformer": {"depth": 1},
    "interfaces.QFormerInterface": {"depth": 2},
    "glm.ChatGLM": {"depth": 1},
    "conformer.SpeechEncoder": {"depth": 2, "pools": (1, 2)},
}


def stage():
    """Stage 3 with video and speech, as shallow as they go."""
    made = stage3_instruction.get_config("tiny")
    made.unroll, made.compute, made.frozen, made.init = 1, "float32", "float32", {}
    for part in made.parts.values():
        part.fields |= SHALLOW.get(part.network, {})
    made.parts.pop("image_interface"), made.modalities.pop("image")
    made.trainable = (r"(video|speech)_interface/adapter/.*",)
    made.optimizer = Optimizer("constant", peak=1e-2)
    items = {"video": 2, "speech": 1}
    made.data = dataclasses.replace(
        made.data, rows=ROWS, length=LENGTH, answers=ANSWERS, items=items, frames=(64,)
    )
    return made


def batch(made) -> ConversationBatch:
    """Two rows: the first text alone, the second a video of two frames and a spoken sentence."""
    rng = np.random.default_rng(0)
    data = made.data
    shapes = {n: (count, modalities.find(n, data).shape(data)) for n, count in data.items.items()}
    found = jax.tree.map(np.array, zeros(ROWS, LENGTH, ANSWERS, 2, shapes))
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


def initial_state(trainer):
    """A state whose parameters NumPy draws: initializing would compile every network."""
    like, made = trainer.abstract_state, trainer.system.stage

    def draw(path, x):
        rng = np.random.default_rng(zlib.crc32(path.encode()))
        drawn = rng.normal(scale=0.1, size=x.shape).astype(np.float32)
        drawn += path.endswith(("scale", "variance"))
        return jax.make_array_from_callback(x.shape, x.sharding, lambda index: drawn[index])

    flat = rules.flatten(rules.join(like.trainable, like.frozen))
    params = rules.unflatten({path: draw(path, x) for path, x in flat.items()})
    trainable, frozen = rules.split(made.trainable, params)
    shardings = jax.tree.map(lambda x: x.sharding, like.optimizer)
    moments = jax.jit(trainer.optimizer.init, out_shardings=shardings)(trainable)
    step = jax.device_put(np.zeros((), np.int32), like.step.sharding)
    guard = jax.device_put(divergence.initial_guard(made.divergence), step.sharding)
    return TrainState(step, trainable, frozen, moments, guard)


def train_steps(made, rows: slice, count: int) -> list[dict[str, float]]:
    """Metrics of `count` steps on this host's rows."""
    device_mesh = mesh.make({"data": -1})
    trainer = Trainer(System.build(made, device_mesh))
    state, step = initial_state(trainer), trainer.step
    own, found = jax.tree.map(lambda x: x[rows], batch(made)), []
    with jax.set_mesh(device_mesh):
        for _ in range(count):
            state, metrics = step(state, mesh.to_global(device_mesh, own))
            found.append(telemetry.means([jax.device_get(metrics)]))
    return found


def train_on_share(index: int, count: int) -> list[dict[str, float]]:
    """Host `index` of `count` fills its share of the two rows."""
    each = ROWS // count
    return train_steps(stage(), slice(index * each, (index + 1) * each), 3)
