"""The vision tower of SigLIP 1 and 2 (transformers' `SiglipVisionModel`) to `models/siglip.py`.

Folders of `SiglipModel` and `SiglipVisionModel` at a fixed resolution. Published names begin with
'vision_model.'; those of a tower that transformers 5 writes have no such beginning. Sizes are told
by the shapes, heads, activation and epsilon by config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xllm_jax.convert import ConversionPlan, Drop, Row, base_sizes, mount, published_config, sizes
from xllm_jax.convert.base_sizes import Base
from xllm_jax.convert.files import Checkpoint
from xllm_jax.convert.sources import clip_vision
from xllm_jax.convert.sources.bert import norm, told
from xllm_jax.convert.sources.eva_vit import PATCHES
from xllm_jax.core.errors import UserError
from xllm_jax.models.siglip import SIZES, SiglipVision

PART = "vision_encoder"
PREFIXES = ("vision_model.", "")
MARK = "embeddings.position_embedding.weight"
OTHER_MARK = "embeddings.class_embedding"  # CLIP's, which has a class token
KINDS = ("siglip", "siglip_vision_model")
CHANNELS = 3
DEFAULTS = dict(
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    num_channels=CHANNELS,
    image_size=224,
    patch_size=16,
    hidden_act="gelu_pytorch_tanh",
    layer_norm_eps=1e-6,
)
"""Of transformers' SiglipVisionConfig."""
DROP = (
    Drop(r"(vision_model\.)?head\..*", "the pooling head; an interface reads the patches"),
    Drop(r".*embeddings\.position_ids", "the numbers 0, 1, 2 …"),
    Drop(r"text_model\..*", "SigLIP's text tower"),
    Drop(r"logit_(scale|bias)", "the temperature and bias of SigLIP's loss"),
)
FILES = ("preprocessor_config.json",)


def rows(
    depth: int, heads: int, *, source: str = "vision_model.", target: str = ""
) -> tuple[Row, ...]:
    """The table.

    Args:
      depth, heads: sizes of the tower.
      source: what the tensors' names start with, one of PREFIXES.
      target: what our paths start with.
    """
    patches = f"{source}embeddings.patch_embedding"
    return (
        Row(f"{patches}.weight", f"{target}embeddings/patches/kernel", PATCHES),
        Row(f"{patches}.bias", f"{target}embeddings/patches/bias"),
        Row(f"{source}{MARK}", f"{target}embeddings/positions"),
        *clip_vision.stack(f"{source}encoder.layers", f"{target}layers", depth, heads),
        *norm(f"{source}post_layernorm", f"{target}norm_behind"),
    )


def _prefixes(checkpoint: Checkpoint) -> list[str]:
    return [
        start
        for start in PREFIXES
        if f"{start}{MARK}" in checkpoint
        and f"{start}embeddings.patch_embedding.bias" in checkpoint
        and f"{start}{OTHER_MARK}" not in checkpoint
    ]


def recognize(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint holds SigLIP's vision tower."""
    return bool(_prefixes(checkpoint))


def options(checkpoint: Checkpoint | None, size: str) -> dict[str, Any]:
    """How the file names its tensors, and the tower's fields.

    Args:
      checkpoint: the file; None exports a tower of our own under the published names.
      size: a row of `models/siglip.py`'s SIZES; '' reads the sizes off the file.

    Raises:
      UserError: an unknown size, not exactly one tower in the file, or a config.json that
        contradicts it or describes what the network does not compute.
    """
    if checkpoint is None:
        return {"prefix": PREFIXES[0], "sizes": sizes.row(SIZES, size)}
    found = _prefixes(checkpoint)
    if len(found) != 1:
        raise UserError(
            f"expected one vision tower of SigLIP, found {len(found)}",
            field=str(checkpoint.path),
            hint="Give a folder such as google/siglip2-so400m-patch14-384, of a fixed size",
        )
    row = _sizes(checkpoint, found[0], size)
    sizes.check_named(SIZES, size, row)
    return {"prefix": found[0], "sizes": row}


def options_of(base: Base) -> dict[str, Any]:
    """The published names, and the tower's sizes from a base's parameters."""
    patch = base.axis(f"{PART}/embeddings/patches/kernel", 0)
    side = round(base.axis(f"{PART}/embeddings/positions", 0) ** 0.5)
    found = {"image_size": side * patch, "patch": patch, **base_sizes.stack(base, f"{PART}/layers")}
    found["width"] = base.axis(f"{PART}/norm_behind/scale", 0)  # which EVA's tower lacks
    return {"prefix": PREFIXES[0], "sizes": found}


def plan(options: Mapping[str, Any]) -> ConversionPlan:
    """The whole source as part 'vision_encoder'."""
    model = SiglipVision(**options["sizes"])
    table = rows(model.depth, model.heads, source=options["prefix"])
    return ConversionPlan(
        table=mount(PART, table),
        shapes={PART: sizes.shapes_of(model)},
        drop=DROP,
        extra_files=FILES,
        fields={PART: told(options["sizes"])},
    )


def _sizes(checkpoint: Checkpoint, prefix: str, size: str) -> dict[str, Any]:
    """Fields of `SiglipVision`: by the shapes, config.json, or a row of SIZES."""
    positions, width = (sizes.axis(checkpoint, f"{prefix}{MARK}", n) for n in (0, 1))
    patch = sizes.axis(checkpoint, f"{prefix}embeddings.patch_embedding.weight", -1)
    start = f"{prefix}encoder.layers."
    fields = dict(
        patch=patch,
        width=width,
        depth=sum(n.startswith(start) and n.endswith(".layer_norm1.weight") for n in checkpoint),
        hidden=sizes.axis(checkpoint, f"{start}0.mlp.fc1.bias", 0),
    )
    side = round(positions**0.5)
    config = published_config.read(checkpoint, DEFAULTS, KINDS, "vision_config")
    if config is None:
        found = sizes.fitting(SIZES, size, checkpoint, **fields)
        return found | {"image_size": _image_size(found["image_size"], side, patch)}
    config.only(num_channels=CHANNELS)
    names = dict(width="hidden_size", depth="num_hidden_layers", hidden="intermediate_size")
    config.agree(patch_size=patch, **{theirs: fields[ours] for ours, theirs in names.items()})
    said = config.values["image_size"]
    said = said[0] if isinstance(said, list) and len(set(map(str, said))) == 1 else said
    if not isinstance(said, int) or said // patch != side or side * side != positions:
        raise config.refuse("image_size", f"and the tensors have {positions} patches of {patch}")
    special = published_config.other_than(
        SiglipVision, activation=config.activation(), epsilon=config.epsilon()
    )
    return fields | special | {"image_size": said, "heads": config.heads(width)}


def _image_size(known: int, side: int, patch: int) -> int:
    """The published size where it has that many patches, else that of whole patches."""
    return known if known // patch == side else side * patch
