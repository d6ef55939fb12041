"""Teaches the mini-GLM to read what interfaces give: the second part of its pre-training.

    xllm train --config=world_llm_slots --workdir=runs/world_llm_slots

Goes on from `world_llm`. Sentences in the speech slot stand character by character, as CIF fires
them, while the LLM's own pieces are words; frames of a clip have no names, as an interface gives
them; and what stands between the media's tags is disturbed (`objectives/slot_noise.py`). In many
rows the speech slot holds what pseudo interfaces make of the words (`models/pseudo_interface.py`).
`world_llm_requests` goes on from it.
"""

from xllm_jax.configs import networks, world_llm
from xllm_jax.core.stage import Optimizer, Source, Stage

# More speech and clips than in the first part.
SHARES = {
    "answer_scene": 0.21,
    "dialogue_scene": 0.05,
    "caption_scene": 0.04,
    "region_scene": 0.02,
    "caption_clip": 0.09,
    "answer_clip": 0.09,
    "repeat_speech": 0.13,
    "repeat_speech_scene": 0.10,
    "answer_speech": 0.26,
    "sentence": 0.01,
}


def get_config(size: str = "tiny") -> Stage:
    stage = world_llm.get_config(size)
    stage.name = "world_llm_slots"
    stage.parts["pseudo_interfaces"] = networks.pseudo_interfaces(size)
    stage.init = {"llm": "runs/world_llm"}
    stage.trainable = (r"llm/.*", r"pseudo_interfaces/.*")
    stage.objective = "slot_noise"
    stage.options = {
        "tags": networks.TINY_TAGS,
        "repeating": networks.TINY_REPEATING,
        "pseudo": 0.6,
        "clean": 0.2,
        "turn": 1.0,
        "shift": 1.0,
        "stretch": 3.0,
        "noise": 0.5,
    }
    stage.optimizer = Optimizer(
        peak=1e-3, minimum=2e-5, warmup_from=1e-5, warmup_steps=300, clip=1.0, b2=0.98
    )
    heard = {"spelled": 1.0, "unnamed": 0.6, "shuffled": 0.85}
    options = {"count": 400_000, "seed": 1, "shares": dict(SHARES), **heard}
    stage.data.sources = {"text": Source("world_text", options=options)}
    stage.steps = 8000
    return stage
