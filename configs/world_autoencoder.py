"""Pre-trains the mini autoencoder on drawn requests of the embedded world.

    xllm train --config=world_autoencoder --workdir=runs/world_autoencoder

The miniature of Stable Diffusion's VAE, on which `world_diffusion` builds. Needs the tokenizer that
`xllm build-backbones --output=bases --tokenizer` writes.
"""

from xllm_jax.configs import networks, sources
from xllm_jax.core.stage import Optimizer, Stage


def get_config(size: str = "tiny") -> Stage:
    return Stage(
        name="world_autoencoder",
        parts={"vae": networks.autoencoder(size)},
        trainable=(r"vae/.*",),
        objective="autoencoder",
        optimizer=Optimizer(
            peak=2e-3, minimum=1e-5, warmup_from=1e-5, warmup_steps=100, clip=1.0, b2=0.98
        ),
        data=sources.drawn_requests(examples=8),
        steps=2400,
        **networks.numerics(size),
    )
