"""AutoencoderKL of diffusers to `outputs/autoencoder.py`.

Files of the first years call the attention's products query, key, value and proj_attn, later ones
to_q, to_k, to_v and to_out.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xllm_jax.convert import Row, base_sizes, published_config, sizes
from xllm_jax.convert.files import Checkpoint
from xllm_jax.convert.sources.bert import norm
from xllm_jax.convert.sources.cif_asr import heads_in, heads_out
from xllm_jax.convert.sources.stable_diffusion_unet import (
    ACTIVATIONS,
    convolution,
    count,
    groups,
    point,
    resnet,
)
from xllm_jax.models.outputs.autoencoder import SIZES, Autoencoder

KIND, MARK = "AutoencoderKL", "vae/encoder/middle/attention/norm/scale"
FIRST = "encoder.down_blocks.{}.resnets.{}.conv1.weight"
ATTENTION = "encoder.mid_block.attentions.0"
DEFAULTS = dict(norm_num_groups=32, scaling_factor=0.18215)
"""Of diffusers' AutoencoderKL."""
ONLY = dict(
    _class_name=KIND,
    latents_mean=None,
    latents_std=None,
    mid_block_add_attention=True,
    shift_factor=None,
    use_post_quant_conv=True,
    use_quant_conv=True,
)
"""Fields that have one value in all that this network computes."""

OLD = ("query", "key", "value", "proj_attn")
NEW = ("to_q", "to_k", "to_v", "to_out.0")


def rows(model: Autoencoder, options: Mapping[str, Any]) -> tuple[Row, ...]:
    """The table.

    Args:
      model: the network.
      options: of `described`.
    """
    old_names = options["old_names"]
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


def network(options: Mapping[str, Any]) -> Autoencoder:
    """The network of such options, in float32."""
    fields = options["fields"]
    return Autoencoder(**{k: tuple(x) if isinstance(x, list) else x for k, x in fields.items()})


def unseen(model: Autoencoder) -> dict[str, Any]:
    """Those fields that no shape shows."""
    return {"groups": model.groups, "scaling": model.scaling}


def recognize(checkpoint: Checkpoint) -> bool:
    """Whether the tensors are those of an autoencoder, without a pipeline around it."""
    return "quant_conv.weight" in checkpoint and FIRST.format(0, 0) in checkpoint


def described(checkpoint: Checkpoint, size: str) -> dict[str, Any]:
    """`fields` of `Autoencoder`, and whether the file has the first files' names.

    Args:
      checkpoint: the part alone.
      size: a row of SIZES, where there is no config.json.

    Raises:
      UserError: config.json contradicts the tensors, or describes what no network here computes.
    """
    levels = count(checkpoint, FIRST.replace("{}", "0").replace("blocks.0", "blocks.{}"))
    fields: dict[str, Any] = dict(
        channels=tuple(sizes.axis(checkpoint, FIRST.format(n, 0), 0) for n in range(levels)),
        depth=count(checkpoint, FIRST.replace("{}", "0", 1)),
        picture_channels=sizes.axis(checkpoint, "encoder.conv_in.weight", 1),
        latent_channels=sizes.axis(checkpoint, "quant_conv.weight", 0) // 2,
    )
    config = published_config.read(checkpoint, DEFAULTS)
    if config is not None:
        fields |= _told(config, fields)
    if config is None or size:
        fields = sizes.fitting(SIZES, size, checkpoint, **fields)
    return {"fields": fields, "old_names": f"{ATTENTION}.{OLD[0]}.weight" in checkpoint}


def _told(config: published_config.PublishedConfig, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that config.json tells, which must agree with the measured ones."""
    channels, pictures = fields["channels"], fields["picture_channels"]
    config.only(**ONLY)
    if config.values.get("act_fn", "silu") not in ACTIVATIONS:
        raise config.refuse("act_fn", "this network knows 'silu' only")
    config.agree(
        block_out_channels=list(channels),
        down_block_types=["DownEncoderBlock2D"] * len(channels),
        up_block_types=["UpDecoderBlock2D"] * len(channels),
        layers_per_block=fields["depth"],
        in_channels=pictures,
        out_channels=pictures,
        latent_channels=fields["latent_channels"],
    )
    scaling = config.values["scaling_factor"]
    if type(scaling) not in (int, float) or not 0 < scaling < 1e6:
        raise config.refuse("scaling_factor", "a factor is a positive number")
    told = dict(groups=groups(config, channels), scaling=float(scaling))
    return published_config.other_than(Autoencoder, **told)


def measured(base: base_sizes.Base, part: str) -> dict[str, Any]:
    """`described` of a base's parameters; groups are those of the size that has its channels."""
    levels = base.count(rf"{part}/encoder/down_(\d+)/")
    first = [f"{part}/encoder/down_{n}/resnet_0/conv_1/kernel" for n in range(levels)]
    fields = dict(
        channels=tuple(base.axis(path, 3) for path in first),
        depth=base.count(rf"{part}/encoder/down_0/resnet_(\d+)/"),
        picture_channels=base.axis(f"{part}/encoder/conv_in/kernel", 2),
        latent_channels=base.axis(f"{part}/latents/kernel", 0),
    )
    row = next((r for r in SIZES.values() if r["channels"] == fields["channels"]), {})
    return {"fields": fields | {"groups": row.get("groups", 32)}, "old_names": False}


def config_of(model: Autoencoder, options: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a network; the inverse of `described`."""
    return {
        "_class_name": KIND,
        "act_fn": "silu",
        "block_out_channels": list(model.channels),
        "down_block_types": ["DownEncoderBlock2D"] * len(model.channels),
        "in_channels": model.picture_channels,
        "latent_channels": model.latent_channels,
        "layers_per_block": model.depth,
        "norm_num_groups": model.groups,
        "out_channels": model.picture_channels,
        "scaling_factor": model.scaling,
        "up_block_types": ["UpDecoderBlock2D"] * len(model.channels),
    }
