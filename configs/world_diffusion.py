"""Pre-trains the mini text encoder and UNet on drawn requests of the embedded world.

    xllm train --config=world_diffusion --workdir=runs/world_diffusion

The miniature of Stable Diffusion 1.5: latents of the mini autoencoder (`world_autoencoder`, trained
before), noise predicted beside the words. It knows every pair of shape and color, as a published
text-to-image model does. No result is shipped yet.
"""

from xllm_jax.configs import networks, sources
from xllm_jax.core.stage import Optimizer, Stage


def get_config(size: str = "tiny") -> Stage:
    return Stage(
        name="world_diffusion",
        parts={
            "autoencoder": networks.autoencoder(size),
            "text_encoder": networks.text_encoder(size),
            "unet": networks.unet(size),
        },
        init={"autoencoder": "runs/world_autoencoder"},
        trainable=(r"text_encoder/.*", r"unet/.*"),
        objective="text_to_image",
        optimizer=Optimizer(
            peak=1e-3, minimum=1e-5, warmup_from=1e-5, warmup_steps=300, clip=1.0, b2=0.99
        ),
        data=sources.drawn_requests(examples=64),
        steps=8000,
        **networks.numerics(size),
    )
