"""What a feature cache saves: steps of stage 2 speech and stage 3 with and without it.

PYTHONPATH=. python benchmarks/feature_cache.py [--steps=12] [--stage=stage2_speech]
PYTHONPATH=. python benchmarks/feature_cache.py --arithmetic

The miniatures train on a world that is built for the occasion, from fresh parameters. Both ways do
the same batches in turn in one process; a step is its batch (files decoded, or features read) and
the training step. The CPU time of all threads is reported, and losses are compared. --arithmetic
counts the FLOPs of the traced steps at the real sizes instead; nothing is allocated.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xllm_jax.training.trainer import Trainer, stage_loss

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from xllm_jax.assembly import networks
from xllm_jax.assembly.system import System
from xllm_jax.core import batch, flops, mesh, rules
from xllm_jax.core.stage import Stage
from xllm_jax.data.media import modalities
from xllm_jax.data.pipeline import Pipeline
from xllm_jax.data.synthetic_world import build as world
from xllm_jax.data.synthetic_world.plan import WorldSizes
from xllm_jax.feature_cache import cache_plan, check, describe, write

STAGES = ("stage2_speech", "stage3_instruction")
REAL = ("stage2_speech", "stage2_image", "stage2_video", "stage3_instruction")
TOKENIZER = "xllm_jax/data/synthetic_world/backbones/llm"


def miniature(name: str, folder: Path) -> Stage:
    """A stage of the embedded world below `folder`, from fresh parameters."""
    stage = importlib.import_module(f"xllm_jax.configs.{name}").get_config("tiny")
    data = dataclasses.replace(stage.data, root=str(folder), tokenizer=TOKENIZER, threads=1)
    return dataclasses.replace(stage, init={}, data=data)


def steps(stage: Stage) -> Iterator[tuple[float, float]]:
    """Trains; yields CPU seconds of a step, what reads ahead in it included, and the loss."""
    device_mesh = mesh.make({}, jax.devices()[:1])
    trainer = Trainer(System.build(stage, device_mesh))
    check.verified(trainer.system)
    state = trainer.initial_state()
    batches = Pipeline(stage.data, stage.seed).iterate()
    while True:
        began = time.process_time()
        made, _ = next(batches)
        with jax.set_mesh(device_mesh):
            state, metrics = trainer.step(state, mesh.to_global(device_mesh, made))
        loss = float(metrics["loss"])
        yield time.process_time() - began, loss


def compare(name: str, folder: Path, count: int) -> None:
    """Prints seconds of both ways and their ratio."""
    stage = miniature(name, folder)
    output = folder / f"{name}_cache"
    began = time.process_time()
    made = cache_plan.make(stage, output, name, 256)
    write.run(made, 16)
    wrote, many = time.process_time() - began, sum(len(job.places) for job in made.jobs)
    data = dataclasses.replace(stage.data, cache=str(output))
    ways = (steps(stage), steps(dataclasses.replace(stage, data=data)))
    rows = [[next(way) for way in ways] for _ in range(count + 1)][1:]  # the first one compiles
    losses = np.array([[loss for _, loss in row] for row in rows])
    totals = np.median([[spent for spent, _ in row] for row in rows], axis=0)
    print(f"{name}: largest difference of losses {np.abs(losses[:, 0] - losses[:, 1]).max():.1e}")
    for way, spent in zip(("without", "with"), totals):
        told = f"{spent:.3f} s a step, {1 / spent:.2f} steps/s"
        print(f"  {way:8}{told} (CPU time, median of {count})")
    print(
        f"  ratio {totals[0] / totals[1]:.2f}; cache of {many} media in {wrote:.1f} s", flush=True
    )


def arithmetic(name: str) -> None:
    """Prints FLOPs per sample at the real size with and without a cache, and bytes per medium."""
    stage = importlib.import_module(f"xllm_jax.configs.{name}").get_config("real")
    image = {k: v for k, v in stage.data.image.items() if k not in ("scale", "flip")}
    stage = dataclasses.replace(stage, data=dataclasses.replace(stage.data, image=image))
    model = networks.model(stage)
    depths = describe.depths(stage, model)
    shapes, items = networks.shapes(model), {}
    for modality, depth in depths.items():
        found = modalities.find(modality, stage.data)
        count = found.items(stage.data)
        given = (
            jax.ShapeDtypeStruct((count, *found.shape(stage.data)), jnp.float32),
            *(jax.ShapeDtypeStruct((count,), jnp.int32) for _ in range(2)),
        )
        run = functools.partial(cache_plan.outcome, model, modality, depth)
        made, _ = jax.eval_shape(run, shapes, *given)
        items[modality] = (stage.data.items[modality], made.shape[1:], made.dtype)
        size, work = made.size * made.dtype.itemsize, flops.measured(run, shapes, *given)
        through = model.chain(modality)[depth - 1]
        print(f"{name}, {modality}: {size:,} bytes, {work / 1e9:,.1f} GFLOP through {through}")
    read = {
        n: (count, modalities.find(n, stage.data).shape(stage.data))
        for n, count in stage.data.items.items()
    }
    cached = dataclasses.replace(model, cached=depths)
    work = [total(stage, model, read), total(stage, cached, items)]
    without, having = (one / stage.data.rows / 1e9 for one in work)
    print(
        f"{name}: {without:,.0f} GFLOP a row without, {having:,.0f} with: {without / having:.2f} x"
    )


def total(stage: Stage, model: Any, items: dict[str, Any]) -> float:
    """FLOPs of one micro-step: loss and gradients of what trains."""
    shapes = jax.eval_shape(
        lambda: batch.zeros(stage.data.rows, stage.data.length, stage.data.answers, 2, items)
    )
    system = System(stage, model, mesh.make({}, jax.devices()[:1]))
    trainable, frozen = rules.split(stage.trainable, system.tree)
    loss = stage_loss(system)

    def value(trainable: Any, frozen: Any, given: Any, key: Any) -> Any:
        return loss(rules.join(trainable, frozen), given, key)[0]

    key = jax.eval_shape(lambda: jax.random.key(0))
    return flops.measured(jax.value_and_grad(value), trainable, frozen, shapes, key)


def main() -> None:
    """Measures, or counts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--stage", choices=STAGES)
    parser.add_argument("--arithmetic", action="store_true")
    flags = parser.parse_args()
    if flags.arithmetic:
        for name in REAL:
            arithmetic(name)
        return
    with tempfile.TemporaryDirectory() as folder:
        names = (field.name for field in dataclasses.fields(WorldSizes))
        sizes = {name: 2 if name.startswith("test") else 40 for name in names}
        made = world.build(Path(folder) / "world", WorldSizes(**sizes), seed=1, workers=0)
        for name in [flags.stage] if flags.stage else STAGES:
            compare(name, made, flags.steps)


if __name__ == "__main__":
    main()
