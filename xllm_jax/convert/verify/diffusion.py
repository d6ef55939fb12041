"""Recordings of diffusers: the networks that draw, their schedules and losses."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from xllm_jax.convert.verify import (
    diffusion_eps,
    diffusion_pipeline,
    diffusion_schedulers,
    diffusion_text,
    diffusion_training,
    diffusion_unet,
    diffusion_vae,
)
from xllm_jax.convert.verify.diffusion_model import Pipeline
from xllm_jax.convert.verify.recording import Replay
from xllm_jax.convert.verify.tolerances import Stated

TOLERANCES: tuple[Stated, ...] = ()  # tolerances.json lists every array
STEPS: dict[str, Callable[[Replay, Pipeline], None]] = {
    "cases_unet.npz": diffusion_unet.values,
    "cases_vae.npz": diffusion_vae.values,
    "cases_eps.npz": diffusion_eps.values,
    "cases_clip.npz": diffusion_text.images,
    "cases_video_clip.npz": diffusion_text.clips,
    "cases_schedulers.npz": diffusion_schedulers.values,
    "cases_training.npz": diffusion_training.values,
    "cases_pipeline.npz": diffusion_pipeline.values,
    "cases_preprocess.npz": diffusion_pipeline.preprocessing,
}


def recognized(folder: Path) -> bool:
    """Whether the folder holds a pipeline of diffusers and known cases."""
    pipeline = (folder / "sd" / "model_index.json").exists()
    return pipeline and any((folder / name).exists() for name in STEPS)


def steps(folder: Path) -> dict[str, Callable[[Replay], None]]:
    """{file: what replays it}."""
    pipeline = Pipeline(folder / "sd")
    return {name: functools.partial(_with, step, pipeline) for name, step in STEPS.items()}


def _with(step: Callable[[Replay, Pipeline], None], pipeline: Pipeline, replay: Replay) -> None:
    step(replay, pipeline)
