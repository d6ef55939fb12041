"""Teaches the mini-GLM to read what interfaces give: the second part of its pre-training.

    xllm train --config=world_llm_slots --workdir=runs/world_llm_slots

Goes on from `world_llm`. Sentences in the speech slot stand character by character, as CIF fires
them, while the LLM's own pieces are words; and what stands between the media's tags is disturbed
(`objectives/slot_noise.py`). Its result ships with the package; `make backbones` runs both files
again.
"""

from xllm_jax.configs import networks, world_llm
from xllm_jax.core.stage import Optimizer, Source, Stage


def get_config(size: str = "tiny") -> Stage:
    stage = world_llm.get_config(size)
    stage.name = "world_llm_slots"
    stage.init = {"llm": "runs/world_llm"}
    stage.objective, stage.options = "slot_noise", {"tags": networks.TINY_TAGS}
    stage.optimizer = Optimizer(
        peak=1e-3, minimum=2e-5, warmup_from=1e-5, warmup_steps=100, clip=1.0, b2=0.98
    )
    options = {"count": 400_000, "seed": 1, "spelled": 0.7}
    stage.data.sources = {"text": Source("world_text", options=options)}
    stage.steps = 1500
    return stage
