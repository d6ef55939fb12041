"""Decoding-side alignment with the denoising loss of NExT-GPT's second version.

    xllm train --config=stage_output_denoising --workdir=runs/stage_output_denoising
    xllm train --config=stage_output_denoising:tiny --workdir=runs/stage_output_denoising

As `stage_output_image`, and the projection also learns from the frozen UNet, which sees CC3M's
pictures under noise: what it misses of them, weighed by Min-SNR (gamma 5), is added unscaled, as
there. The gradient reaches the projection and the new rows alone. Pictures are 224 pixels, as in
that code; `--config.data.signals.image.pixels=512` is what Stable Diffusion 1.5 was trained on.
"""

import dataclasses

from xllm_jax.configs import networks, sources, stage_output_image
from xllm_jax.core.stage import Stage


def get_config(size: str = "real") -> Stage:
    tiny = networks.is_tiny(size)
    made = stage_output_image.get_config(size)
    output = dataclasses.replace(made.outputs["image"], unet="unet", autoencoder="autoencoder")
    signals = dataclasses.replace(made.data.signals["image"], pixels=96 if tiny else 224)
    made.data.signals = {"image": signals}
    if tiny:
        made.data.sources = dict(sources.WORLD_CAPTIONS)
        made.validation = sources.validation(sources.WORLD_CAPTIONS, 72, 200)
        output.schedule = "stable_diffusion_2_1"  # v, as the mini decoder predicts
    through = {"unet": networks.unet(size), "autoencoder": networks.autoencoder(size, trained=True)}
    return dataclasses.replace(
        made,
        name="stage_output_denoising",
        parts=made.parts | through,
        outputs={"image": output},
        init=made.init | {"unet": networks.DECODER, "autoencoder": f"{networks.DECODER}:vae"},
        options=made.options | {"denoising": 1.0, "gamma": 5.0},
        remat=made.remat if tiny else "products",
    )
