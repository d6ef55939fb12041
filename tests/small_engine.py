"""A small served LLM with a prefix and a sensor for its files, and requests of all kinds."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np
import test_new_modality as sensor
from small_stage import TOKENIZER

from xllm_jax.assembly import networks
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Part
from xllm_jax.data.example import Example
from xllm_jax.data.media import modalities
from xllm_jax.data.text.llm_families.glm import Family as GLMFamily
from xllm_jax.inference.load_run import Restored
from xllm_jax.serve.request import Answer, Request, Sampling, Ticket
from xllm_jax.serve.scheduler import Options, Scheduler

OPTIONS = Options(slots=4, length=96, max_tokens=10, queue=16, cache_bytes=2000)
END = GLMFamily(str(TOKENIZER)).ends[0]
WORDS = (
    "图中有什么？",
    "红色的圆在哪里？",
    "有几个方块",
    "Where is the red circle?",
    "是",
    "左边 右边",
)


def restored(prefix: bool = True) -> Restored:
    """Random networks whose answers vary from prompt to prompt, and end."""
    stage = sensor.stage()
    llm = stage.parts["llm"].fields | {"alpha": 0.5}
    parts = stage.parts | {"llm": Part("glm.ChatGLM", "tiny", llm)}
    if prefix:
        fields = {"length": 4, "depth": 2, "width": 32, "heads": 2}
        parts["llm_prefix"] = Part("glm_prefix.Prefix", "tiny", fields)
    stage = dataclasses.replace(stage, parts=parts)
    model = networks.model(stage)
    rng = np.random.default_rng(3)
    params = jax.tree.map(
        lambda x: rng.normal(scale=0.4, size=x.shape).astype(np.float32), networks.shapes(model)
    )
    params["llm"] = jax.tree_util.tree_map_with_path(_plain, params["llm"])
    params["llm"]["embedding"][END] *= 2.5
    return Restored(model, params, stage)


def _plain(path: tuple, leaf: np.ndarray) -> np.ndarray:
    """Biases and norms as they begin; random ones would prefer the same token everywhere."""
    known = {"bias": np.zeros_like, "scale": np.ones_like}
    return known.get(path[-1].key, lambda x: x)(leaf)


def engine(made: Restored, **options: object) -> Scheduler:
    """One that is not started; files are opened in this process."""
    return Scheduler(made, dataclasses.replace(OPTIONS, **options), load=modalities.load)


def series(folder: Path, count: int = 5) -> list[str]:
    """Files of the sensor, of several lengths."""
    rng, made = np.random.default_rng(0), []
    for number in range(count):
        path = folder / f"{number}.npy"
        np.save(path, rng.normal(scale=30, size=(6 + 4 * number, 2)))
        made.append(str(path))
    return made


def requests(files: list[str], count: int, seed: int = 0) -> list[Request]:
    """Of all lengths, with files and without, greedy and drawn, with stops and alternatives."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        words = " ".join(rng.choice(WORDS, int(rng.integers(1, 4))))
        media = [("sensor", str(path)) for path in rng.choice(files, int(rng.integers(0, 3)))]
        history = ((WORDS[0], WORDS[3]),) if rng.random() < 0.3 else ()
        example = Example(str(number), tuple(media), words, history=history)
        sampling = Sampling(
            temperature=float(rng.choice([0.0, 0.7, 3.0])),
            top_p=float(rng.choice([1.0, 0.9, 0.5])),
            top_k=int(rng.choice([0, 3, 50, 10**6])),
            seed=int(rng.integers(2**40)),
            max_tokens=int(rng.integers(1, 20)) if rng.random() < 0.7 else None,
            stop=("e",) if rng.random() < 0.3 else (),
            logprobs=int(rng.integers(0, 5)) if rng.random() < 0.3 else None,
        )
        made.append(Request(str(number), example, sampling))
    return made


def outcome(ticket: Ticket) -> Answer | str:
    """The whole answer, or what was wrong."""
    try:
        return ticket.result(timeout=120)
    except UserError as error:
        return f"{type(error).__name__}: {error}"


def alone(served: Scheduler, asked: list[Request]) -> dict[str, Answer | str]:
    """What each request gets when nothing else runs, by its key."""
    return {one.key: outcome(served.submit(one)) for one in asked}
