"""Pre-trains the mini ViT on drawn scenes of the embedded world that no demo uses.

    xllm train --config=world_vision --workdir=runs/world_vision

The miniature of EVA-CLIP: the encoder learns to tell shape, color, size and place by classifying
patches and cells; held-out pairs of shape and color are never drawn. Only the encoder of the
result is kept and shipped. `make backbones` runs this file again.
"""

from xllm_jax.configs import networks
from xllm_jax.core.stage import Data, Optimizer, Part, Source, Stage


def get_config(size: str = "tiny") -> Stage:
    return Stage(
        name="world_vision",
        parts={
            "vision_encoder": networks.vision_encoder(size),
            "attribute_head": Part("attribute_head.AttributeHead", size),
        },
        trainable=(r"vision_encoder/.*", r"attribute_head/.*"),
        objective="attributes",
        optimizer=Optimizer(
            peak=2e-3, minimum=1e-5, warmup_from=1e-5, warmup_steps=200, clip=1.0, b2=0.98
        ),
        data=Data(
            batch_format="scene_attributes",
            sources={"scenes": Source("world_scenes", options={"count": 400_000})},
            examples=32,
            image={"size": 96, "patch": 16},
        ),
        steps=12_000,
        **networks.numerics(size),
    )
