"""UNet2DConditionModel of diffusers, as Stable Diffusion 1.x and 2.x use it, to `outputs/unet.py`.

The two differ in one name's shape: projections around a transformer are 1x1 convolutions in 1.x and
linear layers in 2.x, which compute the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from xllm_jax.convert import Row, base_sizes, published_config, sizes
from xllm_jax.convert.files import Checkpoint
from xllm_jax.convert.published_config import PublishedConfig
from xllm_jax.convert.sources.bert import linear, norm
from xllm_jax.convert.sources.cif_asr import heads_in, heads_out
from xllm_jax.models.outputs.unet import SIZES, UNet

KERNEL, POINT = "o i h w -> h w i o", "o i 1 1 -> i o"
KIND, MARK = "UNet2DConditionModel", "unet/middle/transformer_0/norm/scale"
FIRST = "down_blocks.{}.resnets.{}.conv1.weight"
MIDDLE = "mid_block.attentions.0"
TEXT = f"{MIDDLE}.transformer_blocks.0.attn2.to_k.weight"
DEFAULTS = dict(attention_head_dim=8, norm_num_groups=32, norm_eps=1e-5)
"""Of diffusers' UNet2DConditionModel."""
ONLY = dict(
    _class_name=KIND,
    addition_embed_type=None,
    attention_type="default",
    center_input_sample=False,
    class_embed_type=None,
    class_embeddings_concat=False,
    conv_in_kernel=3,
    conv_out_kernel=3,
    cross_attention_norm=None,
    downsample_padding=1,
    dual_cross_attention=False,
    encoder_hid_dim=None,
    encoder_hid_dim_type=None,
    flip_sin_to_cos=True,
    freq_shift=0,
    mid_block_scale_factor=1,
    mid_block_type="UNetMidBlock2DCrossAttn",
    num_attention_heads=None,
    num_class_embeds=None,
    only_cross_attention=False,
    resnet_out_scale_factor=1,
    resnet_skip_time_act=False,
    resnet_time_scale_shift="default",
    time_cond_proj_dim=None,
    time_embedding_act_fn=None,
    time_embedding_type="positional",
    timestep_post_act=None,
    transformer_layers_per_block=1,
)
"""Fields that have one value in all that this network computes."""
BLOCKS = {True: "CrossAttn{}Block2D", False: "{}Block2D"}
ACTIVATIONS = ("silu", "swish")


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


def rows(model: UNet, options: Mapping[str, Any]) -> tuple[Row, ...]:
    """The table.

    Args:
      model: the network.
      options: of `described`.
    """
    linear_projection = options["linear_projection"]
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


def network(options: Mapping[str, Any]) -> UNet:
    """The network of such options, in float32."""
    return UNet(**{k: tuple(x) if isinstance(x, list) else x for k, x in options["fields"].items()})


def unseen(model: UNet) -> dict[str, Any]:
    """Those fields that no shape shows."""
    return {"groups": model.groups, "epsilon": model.epsilon}


def recognize(checkpoint: Checkpoint) -> bool:
    """Whether the tensors are those of a UNet that sees a text, without a pipeline around it."""
    return TEXT in checkpoint and FIRST.format(0, 0) in checkpoint


def described(checkpoint: Checkpoint, size: str) -> dict[str, Any]:
    """`fields` of `UNet`, and whether projections are linear layers.

    Args:
      checkpoint: the part alone.
      size: a row of SIZES, where no config.json tells the heads.

    Raises:
      UserError: config.json contradicts the tensors, or describes what no network here computes.
    """
    fields = _measured(checkpoint)
    config = published_config.read(checkpoint, DEFAULTS)
    if config is None:
        fields = sizes.fitting(SIZES, size, checkpoint, **fields)
    else:
        fields |= _told(config, fields)
        fields = sizes.fitting(SIZES, size, checkpoint, **fields) if size else fields
    linear_projection = len(checkpoint.header(f"{MIDDLE}.proj_in.weight").shape) == 2
    return {"fields": fields, "linear_projection": linear_projection}


def count(checkpoint: Mapping[str, Any], name: str) -> int:
    """How many of the names exist that the numbers 0, 1, 2 … make of `name`."""
    return next(n for n in itertools.count() if name.format(n) not in checkpoint)


def _measured(checkpoint: Checkpoint) -> dict[str, Any]:
    """Fields that shapes and names tell."""
    levels = count(checkpoint, FIRST.replace("{}", "0").replace("blocks.0", "blocks.{}"))
    sizes.axis(checkpoint, f"{MIDDLE}.proj_in.weight", 0)
    return dict(
        channels=tuple(sizes.axis(checkpoint, FIRST.format(n, 0), 0) for n in range(levels)),
        transformers=tuple(
            f"down_blocks.{n}.attentions.0.norm.weight" in checkpoint for n in range(levels)
        ),
        depth=count(checkpoint, FIRST.replace("{}", "0", 1)),
        latent_channels=sizes.axis(checkpoint, "conv_in.weight", 1),
        out_channels=sizes.axis(checkpoint, "conv_out.weight", 0),
        text_width=sizes.axis(checkpoint, TEXT, 1),
    )


def _told(config: PublishedConfig, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that config.json tells, which must agree with the measured ones."""
    channels, transformers = fields["channels"], fields["transformers"]
    config = flat(config, ("layers_per_block", "cross_attention_dim", *ONLY))
    config.only(**ONLY, time_embedding_dim=config.values.get("time_embedding_dim"))
    if config.values.get("time_embedding_dim") not in (None, 4 * channels[0]):
        raise config.refuse("time_embedding_dim", f"this network knows {4 * channels[0]} only")
    if config.values.get("act_fn", "silu") not in ACTIVATIONS:
        raise config.refuse("act_fn", "this network knows 'silu' only")
    config.agree(
        block_out_channels=list(channels),
        down_block_types=[BLOCKS[one].format("Down") for one in transformers],
        up_block_types=[BLOCKS[one].format("Up") for one in reversed(transformers)],
        layers_per_block=fields["depth"],
        in_channels=fields["latent_channels"],
        out_channels=fields["out_channels"],
        cross_attention_dim=fields["text_width"],
    )
    epsilon = config.epsilon("norm_eps")
    told = dict(groups=groups(config, channels), epsilon=epsilon)
    return {"heads": _heads(config, channels), **published_config.other_than(UNet, **told)}


def flat(config: PublishedConfig, names: tuple[str, ...]) -> PublishedConfig:
    """The configuration with lists of equal entries, one for each level, as that entry."""
    values = dict(config.values)
    for name in names:
        value = values.get(name)
        if isinstance(value, list) and value and all(one == value[0] for one in value):
            values[name] = value[0]
    return PublishedConfig(values, config.place, config.said)


def groups(config: PublishedConfig, channels: tuple[int, ...]) -> int:
    """Groups of the norms.

    Raises:
      UserError: they do not divide the channels of each level.
    """
    found = config.values.get("norm_num_groups")
    if type(found) is not int or found < 1 or any(n % found for n in channels):
        raise config.refuse("norm_num_groups", f"which does not divide {list(channels)}")
    return found


def _heads(config: PublishedConfig, channels: tuple[int, ...]) -> tuple[int, ...]:
    """Heads of each level: what diffusers calls `attention_head_dim`, by mistake."""
    told = config.values["attention_head_dim"]
    heads = tuple(told) if isinstance(told, list) else (told,) * len(channels)
    fits = len(heads) == len(channels) and all(type(n) is int and n > 0 for n in heads)
    if not fits or any(width % n for width, n in zip(channels, heads)):
        raise config.refuse("attention_head_dim", f"heads must divide {list(channels)}")
    return heads


def measured(base: base_sizes.Base, part: str) -> dict[str, Any]:
    """`described` of a base's parameters; groups are those of the size that has its channels."""
    levels = base.count(rf"{part}/down_(\d+)/")
    first = [f"{part}/down_{n}/resnet_0/conv_1/kernel" for n in range(levels)]
    query = "transformer_0/block/attention/query/kernel"
    middle = base.axis(f"{part}/middle/{query}", 1)
    fields: dict[str, Any] = dict(
        channels=tuple(base.axis(path, 3) for path in first),
        transformers=tuple(f"{part}/down_{n}/{query}" in base for n in range(levels)),
        depth=base.count(rf"{part}/down_0/resnet_(\d+)/"),
        latent_channels=base.axis(f"{part}/conv_in/kernel", 2),
        out_channels=base.axis(f"{part}/conv_out/kernel", 3),
        text_width=base.axis(f"{part}/middle/transformer_0/block/cross_attention/key/kernel", 0),
    )
    fields["heads"] = tuple(
        base.axis(f"{part}/down_{n}/{query}", 1) if transforms else middle
        for n, transforms in enumerate(fields["transformers"])
    )
    row = next((r for r in SIZES.values() if r["channels"] == fields["channels"]), {})
    return {"fields": fields | {"groups": row.get("groups", 32)}, "linear_projection": False}


def config_of(model: UNet, options: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a network; the inverse of `described`."""
    heads = set(model.heads)
    return {
        "_class_name": KIND,
        "act_fn": "silu",
        "attention_head_dim": heads.pop() if len(heads) == 1 else list(model.heads),
        "block_out_channels": list(model.channels),
        "cross_attention_dim": model.text_width,
        "down_block_types": [BLOCKS[one].format("Down") for one in model.transformers],
        "in_channels": model.latent_channels,
        "layers_per_block": model.depth,
        "norm_eps": model.epsilon,
        "norm_num_groups": model.groups,
        "out_channels": model.out_channels,
        "up_block_types": [BLOCKS[one].format("Up") for one in reversed(model.transformers)],
        "use_linear_projection": options["linear_projection"],
    }
