"""Pre-trains the mini ViT on the embedded world: BLIP-2's losses with the encoder unfrozen.

    python launch/train.py --config=configs/world_vision.py --workdir=runs/world_vision

The miniature of what EVA-CLIP's pre-training gave the real encoder. Only the encoder of the result
is kept and shipped; stage 1 starts its Q-Former from scratch. `make backbones` runs this again.
"""

from configs import networks, stage1_image
from xllm_jax.core.stage import Stage


def get_config(size: str = "tiny") -> Stage:
    stage = stage1_image.get_config(size)
    stage.name = "world_vision"
    stage.parts["image_interface"] = networks.pretraining_interface(size)
    stage.init = {}
    stage.trainable = (r"vision_encoder/.*", r"image_interface/.*")
    stage.steps = 4000
    return stage
