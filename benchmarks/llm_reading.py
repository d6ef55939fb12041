"""What the shipped mini LLM makes of held-out text: whole answers right, kind by kind.

    PYTHONPATH=. python benchmarks/llm_reading.py [--base=demo/bases/llm] [--count=200]

Every answer is read along, and counts where the likeliest token is the right one at each of its
places, its end included: a greedy answer is that text then, word for word. Media are written, and
what stands in the speech slot is spelled (as CIF fires it) or in the LLM's own pieces. Requests say
their caption twice, the second time where the LLM reads embeddings that it has never seen and that
are as large as its words'; the stream's others, which say it once, are left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

import xllm_jax
from xllm_jax.assembly import parameters
from xllm_jax.assembly.system import System
from xllm_jax.configs import networks, world_llm_requests
from xllm_jax.convert.sources import world
from xllm_jax.core import mesh
from xllm_jax.core.batch import ConversationBatch
from xllm_jax.core.stage import Stage
from xllm_jax.core.types import Params
from xllm_jax.data.batching import batch_format
from xllm_jax.data.batching.batch_format import BatchPlan
from xllm_jax.data.example import Example
from xllm_jax.data.record import Mode, Record
from xllm_jax.data.sources import world_text
from xllm_jax.models.xllm import LLM

SHIPPED = Path(xllm_jax.__file__).parent / "data" / "synthetic_world" / "backbones" / "llm"
ASKED = {  # {row: (kind of the text stream, how it is written)}
    "questions about written scenes": ("answer_scene", {}),
    "questions about written clips": ("answer_clip", {"unnamed": 1.0}),
    "questions in the speech slot, in pieces": ("answer_speech", {}),
    "questions in the speech slot, spelled": ("answer_speech", {"spelled": 1.0}),
    "spelled sentences to repeat": ("repeat_speech", {"spelled": 1.0}),
    "captions of written requests": ("draw", {}),
    "captions of spelled requests": ("draw_speech", {"spelled": 1.0}),
    "captions of scenes in another color": ("draw_edit", {}),
}
ROWS, HIDDEN = 16, networks.TINY_MASK
LONGEST = {"length": 240, "answers": 128}  # of one row, which holds one example

Read = Callable[[Params, ConversationBatch], jax.Array]


def measure(base: Path, count: int) -> dict[str, float]:
    """{row of ASKED: share of whole answers right}.

    Args:
      base: of the LLM, with its tokenizer.
      count: of the examples of each kind that are read.
    """
    stage = world_llm_requests.get_config()
    stage.init, stage.compute = {LLM: str(base)}, "float32"
    del stage.parts["pseudo_interfaces"]
    stage.trainable = (r"llm/.*",)
    sizes = {"tokenizer": str(base), "examples": ROWS, "rows": ROWS, **LONGEST}
    stage.data = dataclasses.replace(stage.data, **sizes)
    system = System.build(stage, mesh.make({}, jax.devices()[:1]))
    read, params = reader(system), parameters.parameters(system)
    found = {}
    for name, (kind, how) in ASKED.items():
        asked = world_text.examples("", "test", count, 2, {kind: 1.0}, **how)
        right = [one for batch in batches(asked, stage) for one in whole(*batch, read, params)]
        found[name] = float(np.mean(right))
    return found


def reader(system: System) -> Read:
    """The compiled function that tells which tokens of answers `[rows, answers]` are foreseen."""
    model = system.model

    @jax.jit
    def read(params: Params, batch: ConversationBatch) -> jax.Array:
        words = model.embed(params, batch)
        unread = (batch.ids == HIDDEN) & ~batch.context & (batch.segments > 0)
        size = jnp.sqrt(jnp.square(words).mean())
        new = size * jax.random.normal(jax.random.key(0), words.shape, words.dtype)
        x = jnp.where(unread[..., None], new, words)
        states, _ = model.apply(params, LLM, x, batch.segments, batch.context, batch.positions)
        states = jnp.take_along_axis(states, batch.answer_index[..., None], axis=1)
        return model.logits(params, states).argmax(-1) == batch.targets

    return read


def whole(plan: BatchPlan, batch: ConversationBatch, read: Read, params: Params) -> Iterator[bool]:
    """Whether the answer of each example of a batch is foreseen to its end."""
    right = np.asarray(read(params, batch))
    for row, placed in zip(right, plan.rows):
        ends = np.cumsum([len(one.prompt.targets) for one in placed])
        for one, part in zip(placed, np.split(row, ends)):
            if one.record.example.task != "draw" or HIDDEN in one.prompt.ids:
                yield bool(part.all())


def batches(
    asked: Sequence[Example], stage: Stage
) -> Iterator[tuple[BatchPlan, ConversationBatch]]:
    """Batches of ROWS examples and how they are placed."""
    form = batch_format.find(stage.data)
    for start in range(0, len(asked), ROWS):
        numbers = range(start, min(start + ROWS, len(asked)))
        plan = form.plan([Record(asked[n], "text", 0, n, 0) for n in numbers], Mode())
        yield plan, cast(ConversationBatch, form.fill(plan, slice(None), Mode())[0])


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", type=Path)
    parser.add_argument("--count", type=int, default=200)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = given.base
        if base is None:
            world.import_llm(SHIPPED, base := Path(folder) / "llm")
        for name, share in measure(base, given.count).items():
            print(f"{name:42s} {100 * share:5.1f} %")


if __name__ == "__main__":
    main()
