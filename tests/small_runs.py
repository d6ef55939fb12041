"""A small world and untrained miniature runs, to test what works on finished runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from xllm_jax.assembly import networks
from xllm_jax.configs import stage1_speech, stage3_instruction
from xllm_jax.core import checkpoint, checksum
from xllm_jax.core.stage import Stage
from xllm_jax.core.types import Params
from xllm_jax.data.synthetic_world import build as world
from xllm_jax.data.synthetic_world.plan import WorldSizes
from xllm_jax.data.text.characters import CharacterVocabulary

ROOT = Path(__file__).parents[1]
TOKENIZER = ROOT / "xllm_jax" / "data" / "synthetic_world" / "backbones" / "llm"


def make_world(folder: Path, items: int = 8, **more: int) -> Path:
    """A world with `items` test files of each kind, others as `more` says, and its characters."""
    names = (field.name for field in dataclasses.fields(WorldSizes))
    sizes = {name: items if name.startswith("test") else 4 for name in names}
    made = world.build(folder / "world", WorldSizes(**sizes | more), seed=5, workers=0)
    return made


def write_run(
    stage: Stage,
    folder: Path,
    trained: tuple[str, ...],
    change: Callable[[Params], Params] = lambda params: params,
) -> Path:
    """A finished run with random parameters, changed by `change`; parts that did not train become
    bases it names."""
    stage = dataclasses.replace(stage, init={}, compute="float32", frozen="float32", unroll=1)
    model = networks.model(stage)
    # Drawn by NumPy: initializing for real would compile every network. Positive, since running
    # variances are among them.
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: np.abs(rng.normal(scale=0.05, size=x.shape)).astype(np.float32),
        networks.shapes(model),
    )
    params = change(params)
    for part in params.keys() - set(trained):
        checkpoint.save_base(folder.parent / "bases" / part, {part: params[part]}, {})
        stage.init[part] = f"bases/{part}"
    # Of one part only: hashing compiles once for every shape.
    base = {part: checksum.identity(params[part]) for part in ("llm",) if part in params}
    about = {"stage": dataclasses.asdict(stage), "base": base}
    checkpoint.save_base(folder / "final", {part: params[part] for part in trained}, about)
    return folder


def stage3(folder: Path) -> Path:
    """An X-LLM run with all three modalities below `folder`."""
    stage = stage3_instruction.get_config("tiny")
    data = dataclasses.replace(stage.data, tokenizer=str(TOKENIZER), characters="")
    stage = dataclasses.replace(stage, data=data)
    trained = tuple(f"{name}_interface" for name in ("image", "video", "speech"))
    return write_run(stage, folder / "stage3", trained)


def stage1(folder: Path, characters: Path) -> Path:
    """A stage-1 ASR run below `folder`."""
    stage = stage1_speech.get_config("tiny")
    stage = dataclasses.replace(
        stage, data=dataclasses.replace(stage.data, characters=str(characters))
    )
    return write_run(stage, folder / "stage1_speech", tuple(stage.parts))


def write_characters(path: Path, texts: list[str]) -> Path:
    """The ASR model's characters of some texts."""
    CharacterVocabulary.build(texts).save(path)
    return path
