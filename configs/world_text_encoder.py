"""Pre-trains the mini text encoder on the words of drawn requests of the embedded world.

    xllm train --config=world_text_encoder --workdir=runs/world_text_encoder

The miniature of CLIP's text tower, which Stable Diffusion begins with: it learns what words look
like, place by place. Only the encoder of the result is kept; `world_diffusion` builds on it. Needs
the tokenizer that `xllm build-backbones --output=bases --tokenizer` writes.
"""

from xllm_jax.configs import networks, sources
from xllm_jax.core.stage import Optimizer, Part, Stage


def get_config(size: str = "tiny") -> Stage:
    return Stage(
        name="world_text_encoder",
        parts={
            "text_encoder": networks.text_encoder(size),
            "scene_head": Part("scene_head.SceneHead", size),
        },
        trainable=(r"text_encoder/.*", r"scene_head/.*"),
        objective="text_to_scene",
        optimizer=Optimizer(
            peak=1e-3, minimum=1e-5, warmup_from=1e-5, warmup_steps=200, clip=1.0, b2=0.99
        ),
        data=sources.described_scenes(examples=128),
        steps=5000,
        **networks.numerics(size),
    )
