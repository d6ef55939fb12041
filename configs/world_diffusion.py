"""Pre-trains the mini text encoder and UNet on drawn requests of the embedded world.

    xllm train --config=world_diffusion --workdir=runs/world_diffusion

The miniature of Stable Diffusion 2.1, which predicts v (arXiv 2202.00512), beside the words.
Latents come from `xllm build-backbones --latents=runs`, which the mini autoencoder
(`world_autoencoder`, trained before) gave to pictures. It knows every pair of shape and color, as a
published text-to-image model does.
"""

from xllm_jax.configs import networks, sources
from xllm_jax.core.stage import Optimizer, Stage


def get_config(size: str = "tiny") -> Stage:
    return Stage(
        name="world_diffusion",
        parts={"text_encoder": networks.text_encoder(size), "unet": networks.unet(size)},
        trainable=(r"text_encoder/.*", r"unet/.*"),
        objective="text_to_image",
        options={"prediction": "v_prediction"},
        optimizer=Optimizer(
            peak=1e-3, minimum=1e-5, warmup_from=1e-5, warmup_steps=300, clip=1.0, b2=0.99
        ),
        data=sources.drawn_latents(examples=32),
        steps=11_000,
        **networks.numerics(size),
    )
