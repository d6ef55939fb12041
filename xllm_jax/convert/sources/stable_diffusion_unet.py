"""UNet2DConditionModel of diffusers, as Stable Diffusion 1.x and 2.x use it, to `outputs/unet.py`.

The two differ in one name's shape: projections around a transformer are 1x1 convolutions in 1.x and
linear layers in 2.x, which compute the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xllm_jax.convert import Row
from xllm_jax.convert.sources.bert import linear, norm
from xllm_jax.convert.sources.cif_asr import heads_in, heads_out
from xllm_jax.models.outputs.unet import UNet

KERNEL, POINT = "o i h w -> h w i o", "o i 1 1 -> i o"


def convolution(source: str, target: str) -> tuple[Row, ...]:
    """Rows of a convolution."""
    return (
        Row(f"{source}.weight", f"{target}/kernel", KERNEL),
        Row(f"{source}.bias", f"{target}/bias"),
    )


def point(source: str, target: str) -> tuple[Row, ...]:
    """Rows of a 1x1 convolution, which is a dense layer of ours."""
    return (
        Row(f"{source}.weight", f"{target}/kernel", POINT),
        Row(f"{source}.bias", f"{target}/bias"),
    )


def resnet(source: str, target: str, shortcut: bool, time: bool = True) -> tuple[Row, ...]:
    """Rows of a residual block.

    Args:
      source, target: names before its parts.
      shortcut: whether its channels change.
      time: whether it is given a time.
    """
    return (
        *norm(f"{source}.norm1", f"{target}/norm_1"),
        *convolution(f"{source}.conv1", f"{target}/conv_1"),
        *(linear(f"{source}.time_emb_proj", f"{target}/time") if time else ()),
        *norm(f"{source}.norm2", f"{target}/norm_2"),
        *convolution(f"{source}.conv2", f"{target}/conv_2"),
        *(point(f"{source}.conv_shortcut", f"{target}/shortcut") if shortcut else ()),
    )


def transformer(source: str, target: str, heads: int, linear_projection: bool) -> tuple[Row, ...]:
    """Rows of a transformer with one block.

    Args:
      source, target: names before its parts.
      heads: of its attention.
      linear_projection: whether the products around the block are stored as linear layers.
    """
    project = linear if linear_projection else point
    old, new = f"{source}.transformer_blocks.0", f"{target}/block"
    rows = [*norm(f"{source}.norm", f"{target}/norm")]
    rows += project(f"{source}.proj_in", f"{target}/project_in")
    for theirs, ours in (("attn1", "attention"), ("attn2", "cross_attention")):
        for letter, name in (("q", "query"), ("k", "key"), ("v", "value")):
            before, behind = f"{old}.{theirs}.to_{letter}", f"{new}/{ours}/{name}"
            rows += heads_in(before, behind, heads, None, bias=False)
        rows += heads_out(f"{old}.{theirs}.to_out.0", f"{new}/{ours}/out", heads, None)
    for number, name in enumerate(("attention", "cross", "feed_forward"), 1):
        rows += norm(f"{old}.norm{number}", f"{new}/{name}_norm")
    up, sizes = f"{new}/feed_forward/up", (("c", 2),)
    return (
        *rows,
        Row(f"{old}.ff.net.0.proj.weight", f"{up}/kernel", "(c h) d -> d c h", sizes=sizes),
        Row(f"{old}.ff.net.0.proj.bias", f"{up}/bias", "(c h) -> c h", sizes=sizes),
        *linear(f"{old}.ff.net.2", f"{new}/feed_forward/down"),
        *project(f"{source}.proj_out", f"{target}/project_out"),
    )


def rows(model: UNet, linear_projection: bool) -> tuple[Row, ...]:
    """The table.

    Args:
      model: the network.
      linear_projection: as of `transformer`.
    """
    last = len(model.channels) - 1
    rows = [
        *linear("time_embedding.linear_1", "time/first"),
        *linear("time_embedding.linear_2", "time/second"),
        *convolution("conv_in", "conv_in"),
    ]
    for level in range(last + 1):
        rows += _level(model, level, "down", linear_projection)
        if level < last:
            source = f"down_blocks.{level}.downsamplers.0.conv"
            rows += convolution(source, f"down_{level}/downsample")
    middle = (model.heads[last], linear_projection)
    rows += resnet("mid_block.resnets.0", "middle/resnet_0", False)
    rows += transformer("mid_block.attentions.0", "middle/transformer_0", *middle)
    rows += resnet("mid_block.resnets.1", "middle/resnet_1", False)
    for level in range(last, -1, -1):
        rows += _level(model, level, "up", linear_projection)
        if level:
            source, target = f"up_blocks.{last - level}.upsamplers.0.conv", f"up_{last - level}"
            rows += convolution(source, f"{target}/upsample/conv")
    return (*rows, *norm("conv_norm_out", "norm_out"), *convolution("conv_out", "conv_out"))


def _level(model: UNet, level: int, way: str, linear_projection: bool) -> list[Row]:
    """Rows of a level's blocks on one of the two ways."""
    number = level if way == "down" else len(model.channels) - 1 - level
    blocks = model.depth if way == "down" else model.depth + 1
    rows: list[Row] = []
    for block in range(blocks):
        before = model.channels[max(level - 1, 0)]
        # On the way up every block is given more channels than it makes.
        shortcut = way == "up" or (block == 0 and before != model.channels[level])
        source, target = f"{way}_blocks.{number}", f"{way}_{number}"
        rows += resnet(f"{source}.resnets.{block}", f"{target}/resnet_{block}", shortcut)
        if model.transformers[level]:
            names = (f"{source}.attentions.{block}", f"{target}/transformer_{block}")
            rows += transformer(*names, model.heads[level], linear_projection)
    return rows


def network(fields: Mapping[str, Any]) -> UNet:
    """The network of such fields, in float32."""
    return UNet(**{key: tuple(x) if isinstance(x, list) else x for key, x in fields.items()})
