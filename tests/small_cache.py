"""Stages of all modalities that are cached and trained in seconds, and the world they read."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image
from small_runs import TOKENIZER
from small_stage import GLM

from xllm_jax.assembly import networks as assembled
from xllm_jax.configs import networks, sources
from xllm_jax.core import checkpoint, rules
from xllm_jax.core.stage import Data, Optimizer, Part, Source, Stage
from xllm_jax.data import cached_features
from xllm_jax.feature_cache import write
from xllm_jax.feature_cache.cache_plan import FeatureCachePlan, Job

SPEECH_ENCODER = {
    "width": 16, "hidden": 32, "heads": 2, "kernel": 3, "depth": 3, "pools": (1, 2), "channels": 4,
}  # fmt: skip
BERT = {"width": 16, "depth": 1, "heads": 2, "hidden": 32, "llm_width": 32, "encoder_width": 16}
PARTS = {
    "vision_encoder": Part(
        "vit.VisionTransformer",
        "tiny",
        {"image_size": 32, "width": 16, "depth": 1, "heads": 2, "hidden": 32},
    ),
    "speech_encoder": Part("conformer.SpeechEncoder", "tiny", SPEECH_ENCODER),
    "image_interface": Part("interfaces.QFormerInterface", "tiny", {**BERT, "queries": 4}),
    "video_interface": Part("interfaces.QFormerInterface", "tiny", {**BERT, "queries": 4}),
    # Dropout above the cut: the cached run must draw the same masks.
    "speech_interface": Part("speech_interface.SpeechInterface", "tiny", {**BERT, "dropout": 0.1}),
    "llm": Part("glm.ChatGLM", "tiny", dict(GLM)),
}


def stage2_speech(world: Path) -> Stage:
    """What configs/stage2_speech.py says, with networks of a few thousand parameters."""
    return Stage(
        name="small_speech",
        parts={name: PARTS[name] for name in ("speech_encoder", "speech_interface", "llm")},
        modalities={"speech": networks.MODALITIES["speech"]},
        trainable=(r"speech_interface/(?!cif/).*",),
        data=dataclasses.replace(
            data(world),
            sources={name: sources.WORLD[name] for name in ("utterances", "spoken_questions")},
            items={"speech": 1},
        ),
        **common(),
    )


def stage3(world: Path) -> Stage:
    """What configs/stage3_instruction.py says: three modalities, of which the adapters train."""
    return Stage(
        name="small_stage3",
        parts=dict(PARTS),
        modalities=dict(networks.MODALITIES),
        trainable=(r"(image|video|speech)_interface/adapter/.*",),
        data=dataclasses.replace(
            data(world),
            sources={name: sources.WORLD[name] for name in ("instructions", "clips")},
            items={"image": 2, "video": 4, "speech": 2},
        ),
        **common(),
    )


def common() -> dict:
    """Six micro-batches in float32."""
    return {
        "optimizer": Optimizer(peak=1e-2, minimum=1e-3, warmup_from=1e-3, warmup_steps=2, clip=1.0),
        "steps": 6,
        "compute": "float32",
        "frozen": "float32",
        "log_every": 1,
        "save_every": 2,
        "keep": 3,
    }


def data(world: Path) -> Data:
    """Four packed rows of the world's examples."""
    return Data(
        root=str(world),
        tokenizer=str(TOKENIZER),
        examples=6,
        rows=4,
        length=160,
        answers=64,
        embeddings={"image": 4, "video": 4, "speech": 24},
        frames=(416,),
        image={"size": 32},
        video={"frames": 4},
        threads=1,
    )


def based(stage: Stage, folder: Path) -> Stage:
    """The stage with all parameters from a base below `folder`, drawn by NumPy in no time."""
    rng = np.random.default_rng(0)

    def drawn(path: str, x: jax.ShapeDtypeStruct) -> np.ndarray:
        values = rng.normal(scale=0.1, size=x.shape).astype(np.float32)
        return 1 + np.abs(values) if path.endswith(("scale", "variance")) else values

    shapes = rules.flatten(assembled.shapes(assembled.model(stage)))
    params = rules.unflatten({path: drawn(path, x) for path, x in shapes.items()})
    checkpoint.save_base(folder / f"{stage.name}_base", params, {})
    init = dict.fromkeys(stage.parts, str(folder / f"{stage.name}_base"))
    return dataclasses.replace(stage, init=init)


def changed(stage: Stage, **fields) -> Stage:
    """The stage with other fields of its data."""
    return dataclasses.replace(stage, data=dataclasses.replace(stage.data, **fields))


def arithmetic(plan: FeatureCachePlan, job: Job, device_mesh: Any, params: Any) -> write.Compute:
    """Stands for `write.computation` where nothing is to be compiled."""

    def compute(values, lengths, counts):
        totals = values.reshape(len(values), -1).sum(1)
        made = np.zeros((len(values), *job.shape), job.dtype)
        made[:, :2] = totals[:, None, None] + np.arange(1, 3)[:, None]
        return made, lengths

    return compute


def draw(folder: Path, count: int) -> Path:
    """A folder of captioned images."""
    folder.mkdir()
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 40, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text("红色的圆", "utf-8")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """{file: bytes} of the shards, tables and the description of a cache."""
    patterns = ("*.array_record-*", "*.npy", cached_features.MANIFEST)
    files = [path for pattern in patterns for path in folder.glob(pattern)]
    return {path.name: path.read_bytes() for path in files}


def pictures(folder: Path, **fields) -> Stage:
    """A stage that trains the image interface on a folder of captioned images."""
    made = Stage(
        name="small_image",
        parts={name: PARTS[name] for name in ("vision_encoder", "image_interface", "llm")},
        modalities={"image": networks.MODALITIES["image"]},
        trainable=(r"image_interface/.*",),
        data=dataclasses.replace(
            data(folder), sources={"pictures": Source("captions_folder")}, items={"image": 2}
        ),
        **common(),
    )
    return changed(made, **fields)
