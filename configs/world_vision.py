"""Pre-trains the mini ViT on pictures of the embedded world: captioning through the mini-GLM.

    python launch/world.py --output=pictures --images=10000 --seed=77
    python launch/train.py --config=configs/world_vision.py --workdir=runs/world_vision

The miniature of what EVA-CLIP's pre-training on other pictures gave the real encoder: stage 2 with
the encoder unfrozen, on a world that the demo never sees. Only the encoder of the result is kept
and shipped; the interfaces of the demo start from scratch. `make backbones` runs this again.
"""

from configs import stage2_image
from xllm_jax.core.stage import Stage


def get_config(size: str = "tiny") -> Stage:
    stage = stage2_image.get_config(size)
    stage.name = "world_vision"
    stage.init = {"llm": "bases/llm"}
    stage.trainable = (r"vision_encoder/.*", r"image_interface/.*")
    stage.data.root = "pictures"
    stage.optimizer.peak, stage.optimizer.warmup_steps = 2e-3, 200
    stage.steps = 2000
    return stage
