"""AutoencoderKL of diffusers to `outputs/autoencoder.py`.

Files of the first years call the attention's products query, key, value and proj_attn, later ones
to_q, to_k, to_v and to_out.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xllm_jax.convert import Row
from xllm_jax.convert.sources.bert import norm
from xllm_jax.convert.sources.cif_asr import heads_in, heads_out
from xllm_jax.convert.sources.stable_diffusion_unet import convolution, point, resnet
from xllm_jax.models.outputs.autoencoder import Autoencoder

OLD = ("query", "key", "value", "proj_attn")
NEW = ("to_q", "to_k", "to_v", "to_out.0")


def rows(model: Autoencoder, old_names: bool) -> tuple[Row, ...]:
    """The table.

    Args:
      model: the network.
      old_names: whether the file calls attention's products as the first files do.
    """
    last, channels = len(model.channels) - 1, model.channels
    rows = [*convolution("encoder.conv_in", "encoder/conv_in")]
    for level, features in enumerate(channels):
        source, target = f"encoder.down_blocks.{level}", f"encoder/down_{level}"
        rows += _blocks(source, target, model.depth, channels[max(level - 1, 0)] != features)
        if level < last:
            rows += convolution(f"{source}.downsamplers.0.conv", f"{target}/downsample")
    rows += _ends("encoder", old_names)
    rows += convolution("decoder.conv_in", "decoder/conv_in")
    upwards = channels[::-1]
    for level, features in enumerate(upwards):
        source, target = f"decoder.up_blocks.{level}", f"decoder/up_{level}"
        rows += _blocks(source, target, model.depth + 1, upwards[max(level - 1, 0)] != features)
        if level < last:
            rows += convolution(f"{source}.upsamplers.0.conv", f"{target}/upsample/conv")
    rows += _ends("decoder", old_names)
    return (*rows, *point("quant_conv", "moments"), *point("post_quant_conv", "latents"))


def _blocks(source: str, target: str, count: int, shortcut: bool) -> list[Row]:
    """Rows of a level's residual blocks; `shortcut` tells whether the first changes channels."""
    rows: list[Row] = []
    for number in range(count):
        names = (f"{source}.resnets.{number}", f"{target}/resnet_{number}")
        rows += resnet(*names, shortcut and number == 0, time=False)
    return rows


def _ends(half: str, old_names: bool) -> list[Row]:
    """Rows of the middle, and of the last norm and convolution, of encoder or decoder."""
    source, target = f"{half}.mid_block", f"{half}/middle"
    old, new = f"{source}.attentions.0", f"{target}/attention"
    *projections, out = OLD if old_names else NEW
    rows = [*norm(f"{old}.group_norm", f"{new}/norm")]
    for theirs, ours in zip(projections, ("query", "key", "value"), strict=True):
        rows += heads_in(f"{old}.{theirs}", f"{new}/{ours}", 1, None)
    rows += heads_out(f"{old}.{out}", f"{new}/out", 1, None)
    for number in range(2):
        names = (f"{source}.resnets.{number}", f"{target}/resnet_{number}")
        rows += resnet(*names, False, time=False)
    rows += norm(f"{half}.conv_norm_out", f"{half}/norm_out")
    return [*rows, *convolution(f"{half}.conv_out", f"{half}/conv_out")]


def network(fields: Mapping[str, Any]) -> Autoencoder:
    """The network of such fields, in float32."""
    return Autoencoder(**{key: tuple(x) if isinstance(x, list) else x for key, x in fields.items()})
