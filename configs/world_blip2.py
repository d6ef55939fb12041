"""Pre-trains the miniature's Q-Former as BLIP-2's second stage does: against another frozen LLM.

    xllm world --output=pictures --images=16000 --seed=9
    xllm train --config=world_llm --config.seed=7 --config.steps=6000 --workdir=runs/world_other_llm
    xllm train --config=world_blip2 --workdir=runs/world_blip2

The paper's image interface begins with BLIP-2's Q-Former, which had learned to speak to OPT on nine
times as many pairs as X-LLM's second stage has (section 4.1). Here it learns to speak to a mini-GLM
of another seed on four times as many pictures, which no demo uses; held-out pairs of shape and
color are in none of them. `make backbones` runs all of it.
"""

from xllm_jax.configs import stage2_image
from xllm_jax.core.stage import Stage, Validation


def get_config(size: str = "tiny") -> Stage:
    stage = stage2_image.get_config(size)
    stage.name = "world_blip2"
    stage.init = {
        "vision_encoder": "bases/vision_encoder",
        "image_interface": "",
        "llm": "runs/world_other_llm",
    }
    stage.data.root = "pictures"
    stage.steps = 4000
    stage.validation = Validation()
    return stage
