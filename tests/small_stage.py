"""A stage that trains in seconds: a two-layer GLM on the world's text, its embedding frozen."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import forked
import virtual_devices

from xllm_jax.core.stage import Data, Optimizer, Part, Source, Stage

ROOT = Path(__file__).parents[1]
TOKENIZER = ROOT / "xllm_jax" / "data" / "synthetic_world" / "backbones" / "llm"
GLM = {"vocab": 576, "width": 32, "depth": 2, "heads": 2, "hidden": 64, "alpha": 2.0}


def stage(**changes) -> Stage:
    """Eight rows of text; `changes` replace fields of the Stage."""
    made = Stage(
        name="small",
        parts={"llm": Part("glm.ChatGLM", "tiny", dict(GLM))},
        trainable=(r"llm/(layers|final_norm)/.*",),
        objective="answer",
        optimizer=Optimizer(peak=1e-2, minimum=1e-3, warmup_from=1e-3, warmup_steps=2, clip=1.0),
        data=Data(
            sources={"text": Source("world_text", options={"count": 200})},
            tokenizer=str(TOKENIZER),
            examples=16,
            rows=8,
            length=128,
            answers=48,
            threads=1,
        ),
        steps=6,
        compute="float32",
        frozen="float32",
        unroll=2,
        compiler={"tpu": {"xla_no_such_option": 1}},
        log_every=1,
        save_every=2,
    )
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def curve(workdir: Path, name: str = "loss") -> dict[int, float]:
    """{step: value} of a run's log, of the lines that have it."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line[name] for line in lines if name in line}


def start(workdir: Path, code: str = "", devices: int = 1) -> subprocess.Popen:
    """Trains the small stage in a process of its own; `code` may change `made` before."""
    lines = (
        "import sys; sys.path[:0] = ['tests', '.']",
        "import jax; jax.config.update('jax_default_matmul_precision', 'highest')",
        "import small_stage; from xllm_jax.training import loop; made = small_stage.stage()",
        code,
        f"loop.fit(made, {str(workdir)!r})",
    )
    return forked.Popen(
        [sys.executable, "-c", "\n".join(lines)],
        cwd=ROOT,
        env=virtual_devices.environment(devices),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
