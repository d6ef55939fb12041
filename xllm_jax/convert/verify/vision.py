"""Recordings of the vision parts: EVA ViT, Q-Former, interfaces and BLIP-2's first stage."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from xllm_jax.convert.verify import (
    vision_interfaces,
    vision_processors,
    vision_published,
    vision_qformer,
    vision_stage1,
    vision_training,
    vision_vit,
)
from xllm_jax.convert.verify.recording import Replay
from xllm_jax.convert.verify.tolerances import Stated
from xllm_jax.convert.verify.vision_model import CONFIG, Reference

TOLERANCES: tuple[Stated, ...] = ()  # tolerances.json lists every array
STEPS = {
    "cases_vit.npz": vision_vit.values,
    "cases_qformer.npz": vision_qformer.modes,
    "cases_features.npz": vision_qformer.features,
    "cases_interfaces.npz": vision_interfaces.interfaces,
    "cases_hf.npz": vision_published.folders,
    "cases_stage1.npz": vision_stage1.values,
    "cases_stage1_grads.npz": vision_stage1.gradients,
    "cases_stage1_world2.npz": vision_stage1.ranks,
    "cases_adamw.npz": vision_training.adamw,
    "cases_lr.npz": vision_training.schedules,
    "cases_processors.npz": vision_processors.processors,
}


def recognized(folder: Path) -> bool:
    """Whether the folder holds the sizes of a vision encoder and known cases."""
    path = folder / CONFIG
    named = path.exists() and '"vit"' in path.read_text("utf-8")
    return named and any((folder / name).exists() for name in STEPS)


def steps(folder: Path) -> dict[str, Callable[[Replay], None]]:
    """{file: what replays it}."""
    reference = Reference(folder)
    return {name: functools.partial(_with, step, reference) for name, step in STEPS.items()}


def _with(step: Callable, reference: Reference, replay: Replay) -> None:
    step(replay, reference)
