"""Recorded norms and blocks on inputs of so small a variance that an epsilon shows.

Each is taken out of its network as the network builds it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from xllm_jax.convert.verify.diffusion_model import (
    Pipeline,
    first_channels,
    inside,
    last_channels,
    ours,
)
from xllm_jax.convert.verify.recording import Replay

PARTS = {"sd_unet.": "unet", "sd_vae.": "vae", "sd_clip.": "text_encoder"}
BLOCKS = {
    "block.sd_unet.resnet": ("unet", "down_blocks.0.resnets.0", "temb"),
    "block.sd_unet.attention": ("unet", "down_blocks.0.attentions.0", "encoder_hidden_states"),
    "block.sd_vae.decoder_mid": ("vae", "decoder.mid_block", ""),
}
"""{recorded name: (part, module of diffusers, what it is given besides the picture)}."""
CLIP = {
    "layer_norm1": "attention_norm",
    "layer_norm2": "feed_forward_norm",
    "final_layer_norm": "norm_behind",
}


def values(replay: Replay, pipeline: Pipeline) -> None:
    """Single norms, then whole blocks."""
    for start, part in PARTS.items():
        for name in replay.names(f"{start}*.x"):
            module = name.removeprefix(start).removesuffix(".x")
            replay.attempt(_apply, pipeline, name.removesuffix(".x"), part, module, "")
    for name, block in BLOCKS.items():
        if f"{name}.x" in replay:
            replay.attempt(_apply, pipeline, name, *block)


def _apply(
    replay: Replay, pipeline: Pipeline, name: str, part: str, module: str, more: str
) -> None:
    x = replay.input(f"{name}.x")
    others = [jnp.asarray(replay.input(f"{name}.{more}"))] if more else []
    path, layer = _path(part, module)
    params = inside(pipeline.params(part), path)
    if layer is not None:
        params = jax.tree.map(lambda leaf: leaf[layer], params)
    built = pipeline.modules(part)["/".join(path)]
    x = last_channels(x) if x.ndim == 4 else jnp.asarray(x)
    replay.compare(f"{name}.y", first_channels(built.apply({"params": params}, x, *others)))


def _path(part: str, module: str) -> tuple[list[str], int | None]:
    """Where a module of diffusers lies in a part, and its layer in a stack."""
    if part != "text_encoder":
        return ours(module, part), None
    *_, number, name = f"..{module}".split(".")
    return ([CLIP[name]], None) if not number else (["layers", CLIP[name]], int(number))
