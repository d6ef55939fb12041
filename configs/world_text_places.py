"""Goes on with the mini text encoder on requests that mostly name places.

    xllm train --config=world_text_places --workdir=runs/world_text_places

Begins with the run of `world_text_encoder`, which has learned what words look like: a run on such
requests alone had learned next to nothing after 190,000 of them. Only the encoder of the result is
kept; `world_diffusion` builds on it.
"""

from xllm_jax.configs import networks, sources
from xllm_jax.core.stage import Optimizer, Part, Stage


def get_config(size: str = "tiny") -> Stage:
    return Stage(
        name="world_text_places",
        parts={
            "text_encoder": networks.text_encoder(size),
            "scene_head": Part("scene_head.SceneHead", size),
        },
        trainable=(r"text_encoder/.*", r"scene_head/.*"),
        init=dict.fromkeys(("text_encoder", "scene_head"), "runs/world_text_encoder"),
        objective="text_to_scene",
        optimizer=Optimizer(
            peak=1.5e-3, minimum=1e-5, warmup_from=1e-5, warmup_steps=200, clip=1.0, b2=0.99
        ),
        data=sources.described_scenes(examples=64, task="places"),
        steps=6000,
        **networks.numerics(size),
    )
