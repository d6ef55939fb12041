"""Pre-trains the mini UNet on drawn requests of the embedded world.

    xllm train --config=world_diffusion --workdir=runs/world_diffusion

The miniature of Stable Diffusion 2.1, which predicts v (arXiv 2202.00512), beside the words of a
frozen text encoder (`world_text_places`, trained before). Latents come from `xllm build-backbones
--latents=runs`, which the mini autoencoder (`world_autoencoder`, trained before, too) gave to
pictures. It knows every pair of shape and color, as a published text-to-image model does. Noisy
times are drawn more often than others, since words tell most there: what stands where.
"""

from xllm_jax.configs import networks, sources
from xllm_jax.core.stage import Optimizer, Stage


def get_config(size: str = "tiny") -> Stage:
    return Stage(
        name="world_diffusion",
        parts={"text_encoder": networks.text_encoder(size), "unet": networks.unet(size)},
        init={"text_encoder": "runs/world_text_places"},
        trainable=(r"unet/.*",),
        objective="text_to_image",
        options={"prediction": "v_prediction", "late": 2.0},
        optimizer=Optimizer(
            peak=1e-3, minimum=1e-5, warmup_from=1e-5, warmup_steps=300, clip=1.0, b2=0.99
        ),
        data=sources.drawn_latents(examples=32),
        steps=9500,
        **networks.numerics(size),
    )
