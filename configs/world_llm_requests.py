"""Teaches the mini-GLM what pictures are asked for: the third and last part of its pre-training.

    xllm train --config=world_llm_requests --workdir=runs/world_llm_requests

Goes on from `world_llm_slots`. A large LLM knows how to write a detailed prompt for what somebody
wants to see; this one learns it here, from text alone: requests in writing, requests in the speech
slot, and written scenes that are wanted in another color. Mostly it says the prompt again where it
does not read the words that it says (`data/batching/blank_infilling.py`) but embeddings that it has
never seen, as signal tokens have when they are new: each place has to know its own word. Speech
beside a picture is not repeated any more. The LLM that ships is the result; `make backbones` runs
all three files.
"""

import dataclasses

from xllm_jax.configs import networks, world_llm_slots
from xllm_jax.core.stage import Stage

# What is said aloud is the hardest to read, questions as requests.
SHARES = {
    "answer_scene": 0.15,
    "dialogue_scene": 0.04,
    "caption_scene": 0.03,
    "region_scene": 0.01,
    "caption_clip": 0.05,
    "answer_clip": 0.05,
    "repeat_speech": 0.10,
    "answer_speech": 0.24,
    "draw": 0.10,
    "draw_speech": 0.14,
    "draw_edit": 0.08,
    "sentence": 0.01,
}


def get_config(size: str = "tiny") -> Stage:
    stage = world_llm_slots.get_config(size)
    stage.name = "world_llm_requests"
    stage.init = {"llm": "runs/world_llm_slots"}  # beside other pseudo interfaces
    options = stage.data.sources["text"].options
    options.update(seed=2, shares=dict(SHARES))
    stage.options["hidden"] = networks.TINY_MASK
    stage.data = dataclasses.replace(stage.data, examples=40, length=144, answers=64)
    stage.steps = 4500
    return stage
