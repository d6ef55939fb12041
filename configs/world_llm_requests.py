"""Teaches the mini-GLM what pictures are asked for: the third and last part of its pre-training.

    xllm train --config=world_llm_requests --workdir=runs/world_llm_requests

Goes on from `world_llm_slots`. A large LLM knows how to write a detailed prompt for what somebody
wants to see; this one learns it here, from text alone: requests in writing, requests in the speech
slot, and written scenes that are wanted in another color. Mostly it says the prompt again where it
does not read the words that it says (`data/batching/blank_infilling.py`) but embeddings that it has
never seen, as signal tokens have when they are new: each place has to know its own word. Speech
beside a picture is not repeated any more. The base `llm_requests` that ships is the result, beside
which the miniature answers with pictures.
"""

import dataclasses

from xllm_jax.configs import networks, world_llm_slots
from xllm_jax.core.stage import Stage

DRAWN = {"draw": 0.15, "draw_speech": 0.07, "draw_edit": 0.08}


def get_config(size: str = "tiny") -> Stage:
    stage = world_llm_slots.get_config(size)
    stage.name = "world_llm_requests"
    stage.init = {"llm": "runs/world_llm_slots"}  # beside other pseudo interfaces
    shares = {
        kind: 0.7 * share
        for kind, share in world_llm_slots.SHARES.items()
        if kind != "repeat_speech_scene"
    }
    options = stage.data.sources["text"].options
    options.update(seed=2, shares={**shares, **DRAWN})
    stage.options["hidden"] = networks.TINY_MASK
    stage.data = dataclasses.replace(stage.data, examples=40, length=144, answers=64)
    stage.steps = 3500
    return stage
