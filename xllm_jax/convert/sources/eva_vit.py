"""EVA-CLIP g/14 as BLIP-2 publishes it (`eva_vit_g.pth`) and as Hugging Face's BLIP-2 stores it.

The file has 40 blocks, BLIP-2 uses the first 39; the last block, the final norm and the head are
dropped by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from xllm_jax.convert import ConversionPlan, Drop, Row, base_sizes, sizes
from xllm_jax.convert.base_sizes import Base
from xllm_jax.convert.files import Checkpoint
from xllm_jax.convert.sources.bert import linear, norm
from xllm_jax.core.errors import UserError
from xllm_jax.models.vit import SIZES, VisionTransformer

IDLE = "a bias on keys shifts all scores of a query alike, and the softmax stays as it is"
PATCHES = "d c p q -> p q c d"


def rows(depth: int, heads: int, *, source: str = "", target: str = "") -> tuple[Row, ...]:
    """Table of `eva_vit_g.pth`, or of a LAVIS file with `source='visual_encoder.'`.

    Args:
      depth: blocks of the model, one fewer than the file has.
      heads: number of heads.
      source: what the tensors' names start with.
      target: what our paths start with.
    """
    old, new, layers = f"{source}blocks.{{layer}}", f"{target}layers", tuple(range(depth))
    sizes, attention = (("h", heads),), f"{target}layers/attention"
    rows = [
        Row(f"{source}cls_token", f"{target}embeddings/class_token", "1 1 d -> d"),
        Row(f"{source}pos_embed", f"{target}embeddings/positions", "1 n d -> n d"),
        Row(f"{source}patch_embed.proj.weight", f"{target}embeddings/patches/kernel", PATCHES),
        Row(f"{source}patch_embed.proj.bias", f"{target}embeddings/patches/bias"),
        Row(f"{old}.attn.q_bias", f"{attention}/query/bias", "(h k) -> h k", layers, sizes),
        Row(f"{old}.attn.v_bias", f"{attention}/value/bias", "(h k) -> h k", layers, sizes),
        *_projections(f"{old}.attn.qkv.weight", attention, layers, sizes),
        _out(f"{old}.attn.proj.weight", attention, layers, sizes),
        Row(f"{old}.attn.proj.bias", f"{attention}/out/bias", "", layers),
    ]
    return (
        *rows,
        *norm(f"{old}.norm1", f"{new}/attention_norm", layers),
        *norm(f"{old}.norm2", f"{new}/feed_forward_norm", layers),
        *linear(f"{old}.mlp.fc1", f"{new}/feed_forward/up", layers),
        *linear(f"{old}.mlp.fc2", f"{new}/feed_forward/down", layers),
    )


def hf_rows(
    depth: int, heads: int, *, source: str = "vision_model.", target: str = ""
) -> tuple[Row, ...]:
    """Table of the vision model in a Hugging Face BLIP-2 folder.

    There q, k and v share one bias, whose middle third is of no effect, see IDLE.
    `post_layernorm` is our interface's norm and is not in this table.
    """
    old, new = f"{source}encoder.layers.{{layer}}", f"{target}layers"
    layers, sizes, attention = tuple(range(depth)), (("h", heads),), f"{target}layers/attention"
    tables, bias = f"{source}embeddings", f"{old}.self_attn.qkv.bias"
    biases = [
        Row(bias, f"{attention}/{name}/bias", "(h k) -> h k", layers, sizes, (piece, 3), (1,), IDLE)
        for piece, name in ((0, "query"), (2, "value"))
    ]
    return (
        Row(f"{tables}.class_embedding", f"{target}embeddings/class_token", "1 1 d -> d"),
        Row(f"{tables}.position_embedding", f"{target}embeddings/positions", "1 n d -> n d"),
        Row(f"{tables}.patch_embedding.weight", f"{target}embeddings/patches/kernel", PATCHES),
        Row(f"{tables}.patch_embedding.bias", f"{target}embeddings/patches/bias"),
        *biases,
        *_projections(f"{old}.self_attn.qkv.weight", attention, layers, sizes),
        _out(f"{old}.self_attn.projection.weight", attention, layers, sizes),
        Row(f"{old}.self_attn.projection.bias", f"{attention}/out/bias", "", layers),
        *norm(f"{old}.layer_norm1", f"{new}/attention_norm", layers),
        *norm(f"{old}.layer_norm2", f"{new}/feed_forward_norm", layers),
        *linear(f"{old}.mlp.fc1", f"{new}/feed_forward/up", layers),
        *linear(f"{old}.mlp.fc2", f"{new}/feed_forward/down", layers),
    )


def drop(depth: int, source: str = "") -> tuple[Drop, ...]:
    """What `eva_vit_g.pth` holds beyond a model of `depth` blocks: one block, a norm and a head."""
    start = re.escape(source)
    return (
        Drop(rf"{start}blocks\.{depth}\..*", "BLIP-2 cuts the last block"),
        Drop(rf"{start}(fc_)?norm\..*", "BLIP-2 cuts the final norm"),
        Drop(rf"{start}head\..*", "BLIP-2 cuts the head"),
    )


def check_depth(names: Iterable[str], depth: int, source: str = "") -> None:
    """Tells a file of another depth by name, since dropping one block would hide it.

    Raises:
      UserError: the file has neither `depth` nor `depth + 1` blocks.
    """
    pattern = re.escape(source) + r"blocks\.(\d+)\..*"
    found = 1 + max((int(m[1]) for name in names if (m := re.fullmatch(pattern, name))), default=-1)
    if found not in (depth, depth + 1):
        raise UserError(
            f"the file has {found} blocks, a model of {depth} needs {depth} or {depth + 1}",
            hint="Choose the size that fits the checkpoint",
        )


def _projections(source: str, target: str, layers: tuple[int, ...], sizes) -> list[Row]:
    return [
        Row(source, f"{target}/{name}/kernel", "(h k) d -> d h k", layers, sizes, (piece, 3))
        for piece, name in enumerate(("query", "key", "value"))
    ]


def _out(source: str, target: str, layers: tuple[int, ...], sizes) -> Row:
    return Row(source, f"{target}/out/kernel", "d (h k) -> h k d", layers, sizes)


def recognize(checkpoint: Checkpoint) -> bool:
    """Whether the tensors are those of `eva_vit_g.pth`."""
    return {"cls_token", "blocks.0.attn.q_bias", "blocks.0.attn.qkv.weight"} <= checkpoint.keys()


def options(checkpoint: Checkpoint | None, size: str) -> dict[str, Any]:
    """Fields of `VisionTransformer`.

    Raises:
      UserError: unknown size, or a file of another depth.
    """
    if checkpoint is None:
        return sizes.row(SIZES, size)
    chosen = sizes.row(SIZES, size, width=sizes.axis(checkpoint, "cls_token", -1))
    check_depth(checkpoint, chosen["depth"])
    return chosen


def options_of(base: Base) -> dict[str, Any]:
    """Fields of `VisionTransformer` from a base's parameters."""
    return base_sizes.tower(base, "vision_encoder")


def plan(options: Mapping[str, Any]) -> ConversionPlan:
    """The whole source as part 'vision_encoder'."""
    model = VisionTransformer(**options)
    return ConversionPlan(
        table=rows(model.depth, model.heads, target="vision_encoder/"),
        shapes={"vision_encoder": sizes.shapes_of(model)},
        drop=drop(model.depth),
    )
