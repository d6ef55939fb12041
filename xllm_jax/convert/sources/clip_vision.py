"""The vision tower of CLIP, as Hugging Face and as OpenAI name it, to `models/clip_vision.py`.

`rows` reads folders of `CLIPVisionModel` and `CLIPModel`, `openai_rows` the original names, which
OpenAI's own .pt files (TorchScript archives, `torchscript.py`) and open_clip's have.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from xllm_jax.convert import (
    ConversionPlan,
    Drop,
    Row,
    base_sizes,
    bounds,
    mount,
    published_config,
    sizes,
)
from xllm_jax.convert.base_sizes import Base
from xllm_jax.convert.files import Checkpoint
from xllm_jax.convert.published_config import PublishedConfig
from xllm_jax.convert.sources.bert import linear, norm, told
from xllm_jax.convert.sources.cif_asr import heads_in, heads_out
from xllm_jax.convert.sources.eva_vit import PATCHES
from xllm_jax.core.errors import UserError
from xllm_jax.models.clip_text import ClipText
from xllm_jax.models.clip_vision import SIZES, ClipVision

PART = "clip_vision"
OPENAI = "visual.ln_pre.weight"
PUBLISHED = "vision_model.pre_layrnorm.weight"  # spelt so in the files
MARKS = (PUBLISHED, "pre_layrnorm.weight", OPENAI)
ACTIVATION, CHANNELS = "quick_gelu", 3
KINDS = ("clip", "clip_vision_model", "chinese_clip", "chinese_clip_vision_model", "metaclip_2")
DEFAULTS = dict(num_attention_heads=12, hidden_act=ACTIVATION, layer_norm_eps=1e-5)
"""Of transformers' CLIPVisionConfig."""
HEAD_WIDTH = 64  # of every published CLIP; heads cannot be read off the shapes
DROP = (
    Drop(r".*embeddings\.position_ids", "the numbers 0, 1, 2 …"),
    Drop(r"visual_projection\.weight|visual\.proj", "the projection into CLIP's shared space"),
    Drop(r"(text_model|transformer|token_embedding|ln_final)\..*", "CLIP's text tower"),
    Drop(r"text_projection(\.weight)?|positional_embedding", "CLIP's text tower"),
    Drop(r"logit_scale", "the temperature of CLIP's loss"),
    Drop(r"input_resolution|context_length|vocab_size", "a size, not a parameter"),
)
"""What the files of the whole of CLIP hold beyond the tower."""


def rows(
    depth: int, heads: int, *, source: str = "vision_model.", target: str = ""
) -> tuple[Row, ...]:
    """Table of Hugging Face's files.

    Args:
      depth, heads: sizes of the tower.
      source: what the tensors' names start with (`prefix_of` tells).
      target: what our paths start with.
    """
    return (
        *_tables(
            f"{source}embeddings.class_embedding",
            f"{source}embeddings.position_embedding.weight",
            f"{source}embeddings.patch_embedding.weight",
            target,
        ),
        *norm(f"{source}pre_layrnorm", f"{target}norm_before"),
        *norm(f"{source}post_layernorm", f"{target}norm_behind"),
        *stack(f"{source}encoder.layers", f"{target}layers", depth, heads),
    )


def openai_rows(depth: int, heads: int, *, target: str = "") -> tuple[Row, ...]:
    """Table of the original names, where query, key and value share one tensor."""
    return (
        *_tables(
            "visual.class_embedding", "visual.positional_embedding", "visual.conv1.weight", target
        ),
        *norm("visual.ln_pre", f"{target}norm_before"),
        *norm("visual.ln_post", f"{target}norm_behind"),
        *openai_stack("visual.transformer.resblocks", f"{target}layers", depth, heads),
    )


def stack(source: str, new: str, depth: int, heads: int) -> tuple[Row, ...]:
    """Rows of the blocks of either tower of Hugging Face's files.

    Args:
      source: what stands before a layer's number, such as 'vision_model.encoder.layers'.
      new: of ours, such as 'layers'.
      depth, heads: sizes of the tower.
    """
    old, layers = f"{source}.{{layer}}", tuple(range(depth))
    projections = [
        row
        for letter, name in (("q", "query"), ("k", "key"), ("v", "value"))
        for row in heads_in(
            f"{old}.self_attn.{letter}_proj", f"{new}/attention/{name}", heads, layers
        )
    ]
    return (
        *projections,
        *heads_out(f"{old}.self_attn.out_proj", f"{new}/attention/out", heads, layers),
        *norm(f"{old}.layer_norm1", f"{new}/attention_norm", layers),
        *norm(f"{old}.layer_norm2", f"{new}/feed_forward_norm", layers),
        *linear(f"{old}.mlp.fc1", f"{new}/feed_forward/up", layers),
        *linear(f"{old}.mlp.fc2", f"{new}/feed_forward/down", layers),
    )


def openai_stack(source: str, new: str, depth: int, heads: int) -> tuple[Row, ...]:
    """Rows of the blocks of either tower by the original names; arguments as of `stack`."""
    old, layers, sizes = f"{source}.{{layer}}", tuple(range(depth)), (("h", heads),)
    projections = [
        Row(
            f"{old}.attn.in_proj_{kind}",
            f"{new}/attention/{name}/{leaf}",
            pattern,
            layers,
            sizes,
            (piece, 3),
        )
        for piece, name in enumerate(("query", "key", "value"))
        for kind, leaf, pattern in (
            ("weight", "kernel", "(h k) d -> d h k"),
            ("bias", "bias", "(h k) -> h k"),
        )
    ]
    return (
        *projections,
        *heads_out(f"{old}.attn.out_proj", f"{new}/attention/out", heads, layers),
        *norm(f"{old}.ln_1", f"{new}/attention_norm", layers),
        *norm(f"{old}.ln_2", f"{new}/feed_forward_norm", layers),
        *linear(f"{old}.mlp.c_fc", f"{new}/feed_forward/up", layers),
        *linear(f"{old}.mlp.c_proj", f"{new}/feed_forward/down", layers),
    )


def table(mark: str, depth: int, heads: int) -> tuple[Row, ...]:
    """The table of the layout that has the tensor `mark`, one of MARKS."""
    if mark == OPENAI:
        return openai_rows(depth, heads)
    return rows(depth, heads, source=mark.removesuffix("pre_layrnorm.weight"))


def recognize(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint holds CLIP's vision tower."""
    return any(name in checkpoint for name in MARKS)


def options(checkpoint: Checkpoint | None, size: str) -> dict[str, Any]:
    """How the file names its tensors, and the tower's sizes.

    Args:
      checkpoint: the file; None exports a tower of our own under the published names.
      size: a row of `models/clip_vision.py`'s SIZES; '' reads the sizes off the file.

    Raises:
      UserError: an unknown size, or not exactly one tower in the file.
    """
    if checkpoint is None:
        return {"mark": PUBLISHED, "sizes": sizes.row(SIZES, size)}
    found = [name for name in MARKS if name in checkpoint]
    if len(found) != 1:
        raise UserError(
            f"expected one vision tower of CLIP, found {len(found)}",
            field=str(checkpoint.path),
            hint="Give a folder of openai/clip-vit-base-patch16, or OpenAI's ViT-B-16.pt",
        )
    first_layer = table(found[0], 1, 1)
    configured = read_config(checkpoint, "vision_config", DEFAULTS) is not None
    row = sizes.row(SIZES, size) if size and not configured else _sizes(checkpoint, first_layer)
    sizes.check_named(SIZES, size, row)
    return {"mark": found[0], "sizes": row}


def options_of(base: Base) -> dict[str, Any]:
    """The published names, and the tower's sizes from a base's parameters."""
    return {"mark": PUBLISHED, "sizes": base_sizes.tower(base, PART)}


def plan(options: Mapping[str, Any]) -> ConversionPlan:
    """The part 'clip_vision' of one layout and size."""
    model = ClipVision(**options["sizes"])
    rows = table(options["mark"], model.depth, model.heads)
    return ConversionPlan(
        table=mount(PART, rows),
        shapes={PART: sizes.shapes_of(model)},
        drop=DROP,
        fields={PART: told(options["sizes"])},
    )


def _sizes(checkpoint: Checkpoint, first_layer: Iterable[Row]) -> dict[str, int]:
    """Fields of `ClipVision` from a file's shapes; the rest from config.json, or as published."""
    config = read_config(checkpoint, "vision_config", DEFAULTS)
    source = {row.target: row.source for row in first_layer}

    def axis(target: str, number: int) -> int:
        return sizes.axis(checkpoint, source[target].replace("{layer}", "0"), number)

    positions, width = (axis("embeddings/positions", number) for number in (0, 1))
    patch = axis("embeddings/patches/kernel", -1)
    start, end = source["layers/attention_norm/scale"].split("{layer}")
    fields = dict(
        image_size=round((positions - 1) ** 0.5) * patch,
        patch=patch,
        width=width,
        depth=sum(name.startswith(start) and name.endswith(end) for name in checkpoint),
        hidden=axis("layers/feed_forward/up/bias", 0),
    )
    if config:
        config.agree(image_size=fields["image_size"], patch_size=patch)
    return fields | described(config, ClipVision, fields)


def described(
    config: PublishedConfig | None,
    network: type[ClipVision] | type[ClipText],
    fields: Mapping[str, int],
) -> dict[str, Any]:
    """Heads and the epsilon of a tower: those of its config.json, else as published.

    Args:
      config: of the tower.
      network: its class.
      fields: that its shapes tell.

    Raises:
      UserError: config.json contradicts them, or describes what the network does not compute.
    """
    if config is None:
        return {"heads": max(1, fields["width"] // HEAD_WIDTH)}
    names = dict(width="hidden_size", depth="num_hidden_layers", hidden="intermediate_size")
    config.agree(**{theirs: fields[ours] for ours, theirs in names.items()})
    told = published_config.other_than(network, epsilon=config.epsilon())
    return {"heads": config.heads(fields["width"]), **told}


def _open_clip(checkpoint: Checkpoint, section: str) -> PublishedConfig | None:
    """A tower of open_clip_config.json in the words of transformers; None where there is none."""
    file = checkpoint.config_file().with_name("open_clip_config.json")
    try:
        whole = bounds.read_json(file)["model_cfg"] if file.is_file() else None
        if whole is None:
            return None
        tower = whole["vision_cfg" if section == "vision_config" else "text_cfg"]
        heads = tower.get("heads") or tower["width"] // tower.get("head_width", HEAD_WIDTH)
        told = dict(hidden_size=tower["width"], num_hidden_layers=tower["layers"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"is no configuration of open_clip ({type(error).__name__})"
        raise UserError(what, field=str(file), hint="Download it again") from error
    activation = ACTIVATION if whole.get("quick_gelu") else "gelu"
    values = DEFAULTS | told | dict(num_attention_heads=heads, hidden_act=activation)
    values |= dict(eos_token_id=2)  # the largest id ends a text
    return PublishedConfig(values, f"{file}: {section}.", frozenset(told))


def read_config(
    checkpoint: Checkpoint, section: str, defaults: Mapping[str, Any]
) -> PublishedConfig | None:
    """What config.json says of one tower; None where there is none, as beside OpenAI's files.

    Args:
      checkpoint: the opened files.
      section: such as 'vision_config'.
      defaults: of transformers.

    Raises:
      UserError: another activation than CLIP's, or another model.
    """
    config = published_config.read(checkpoint, defaults, KINDS, section)
    if config is None and OPENAI in checkpoint:
        config = _open_clip(checkpoint, section)
    if config and config.values["hidden_act"] != ACTIVATION:
        found = config.values["hidden_act"]
        what = f"{section} has the activation {found!r}, this network {ACTIVATION!r}"
        hint = "Give one of OpenAI's models, such as openai/clip-vit-base-patch16"
        raise UserError(what, field=f"{config.place}hidden_act", hint=hint)
    if config:
        config.only(num_channels=CHANNELS)
    return config


def _tables(token: str, positions: str, patches: str, target: str) -> tuple[Row, ...]:
    return (
        Row(token, f"{target}embeddings/class_token"),
        Row(positions, f"{target}embeddings/positions"),
        Row(patches, f"{target}embeddings/patches/kernel", PATCHES),
    )
