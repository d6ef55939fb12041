"""BLIP-2 checkpoints to the Q-Former interface and its stage-1 model.

Three layouts hold the same network: LAVIS stage 1 (with heads, with or without the ViT), LAVIS
stage 2 (the image interface), and Hugging Face folders. X-LLM's own runs have a table in `xllm.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from xllm_jax.convert import ConversionPlan, Drop, Row, base_sizes, import_tree, mount, sizes
from xllm_jax.convert.base_sizes import Base
from xllm_jax.convert.files import Checkpoint, Derived, View
from xllm_jax.convert.sources import blip2_hugging_face, eva_vit
from xllm_jax.convert.sources.bert import (
    attention_rows,
    feed_forward_rows,
    linear,
    named_as,
    norm,
    told,
)
from xllm_jax.core import rules
from xllm_jax.core.errors import UserError
from xllm_jax.models import blip2_pretraining as contrast_model
from xllm_jax.models import interfaces, vit
from xllm_jax.models.blip2_pretraining import ContrastModel
from xllm_jax.models.interfaces import QFormerInterface

LAVIS = "Qformer.bert."
DECODER = "Qformer.cls.predictions.decoder"
WORDS = f"{LAVIS}embeddings.word_embeddings.weight"

VISION = {"lavis": "visual_encoder.", "hf": "vision_model."}
VISION_MARK = {"lavis": "visual_encoder.cls_token", "hf": blip2_hugging_face.SEEN}

TEXT_LAYERS = r".*encoder\.layer\.\d+\.(intermediate|output)\..*"
DROP = (
    Drop(r".*position_ids", "the numbers 0, 1, 2 …"),
    Drop(r"(visual_encoder|vision_model)\..*", "the vision encoder has a table of its own"),
    Drop(r"language_model\..*", "another LLM"),
)
DROP_TEXT = (
    Drop(TEXT_LAYERS, "the text branch is not used after stage 1"),
    Drop(r".*(word|position)_embeddings\.weight", "the text branch is not used after stage 1"),
    Drop(
        r"(Qformer\.cls|vision_proj|text_proj|vision_projection|text_projection|itm_head)\..*|temp",
        "a head of stage 1",
    ),
)


def layer_rows(
    depth: int,
    heads: int,
    frequency: int,
    *,
    source: str = LAVIS,
    target: str = "qformer/",
    text: bool = False,
    inner: str = "self",
) -> tuple[Row, ...]:
    """Rows of a Q-Former's layers, which we stack by their place within a group.

    Args:
      depth, heads, frequency: layers, heads, cross-attention frequency.
      source: what the tensors' names start with.
      target: what our paths start with.
      text: fill the text rows' feed-forward too.
      inner: name of the attention projections' module in the source.
    """
    rows: list[Row] = []
    whole = depth // frequency * frequency
    for number in range(frequency):
        places = [("groups", tuple(range(number, whole, frequency)))]
        places += [("tail", (whole + number,))] if whole + number < depth else []
        for group, layers in places:
            if not layers:
                continue
            old, new = f"{source}encoder.layer.{{layer}}", f"{target}{group}/layer_{number}"
            rows += attention_rows(f"{old}.attention", f"{new}/attention", heads, layers, inner)
            if number == 0:
                cross, ours = f"{old}.crossattention", f"{new}/cross_attention"
                rows += attention_rows(cross, ours, heads, layers, inner)
            rows += feed_forward_rows(old, f"{new}/query_feed_forward", layers, "_query")
            rows += feed_forward_rows(old, f"{new}/text_feed_forward", layers) if text else ()
    return tuple(rows)


def rows(depth: int, heads: int, frequency: int, kind: str, text: bool) -> tuple[Row, ...]:
    """Rows of norm, queries and Q-Former.

    Args:
      depth, heads, frequency: layers, heads, cross-attention frequency.
      kind: 'lavis' or 'hf'.
      text: fill the text branch too.
    """
    hf = kind == "hf"
    old, embeddings = ("qformer.", "embeddings") if hf else (LAVIS, f"{LAVIS}embeddings")
    tables = [
        Row(f"{embeddings}.{kind}_embeddings.weight", f"qformer/embeddings/{name}")
        for kind, name in (("word", "words"), ("position", "positions"))
        if text
    ]
    return (
        Row("query_tokens", "queries", "1 n d -> n d"),
        *norm("vision_model.post_layernorm" if hf else "ln_vision", "norm"),
        *norm("qformer.layernorm" if hf else f"{embeddings}.LayerNorm", "qformer/embeddings/norm"),
        *tables,
        *layer_rows(
            depth, heads, frequency, source=old, text=text, inner="attention" if hf else "self"
        ),
    )


def head_rows(kind: str) -> tuple[Row, ...]:
    """Rows of the stage-1 heads; Hugging Face keeps neither language head nor temperature."""
    vision, text = ("vision_projection", "text_projection")
    if kind == "hf":
        return (
            *linear(vision, "image_projection"),
            *linear(text, "text_projection"),
            *linear("itm_head", "match_head"),
        )
    cls = "Qformer.cls.predictions"
    return (
        *linear("vision_proj", "image_projection"),
        *linear("text_proj", "text_projection"),
        *linear("itm_head", "match_head"),
        Row("temp", "temperature"),
        Row(f"{cls}.bias", "language_head/bias"),
        *linear(f"{cls}.transform.dense", "language_head/dense"),
        *norm(f"{cls}.transform.LayerNorm", "language_head/norm"),
    )


def from_bert_rows(model: ContrastModel) -> tuple[Row, ...]:
    """Rows of what a Q-Former takes from a BERT with its language head, but for added words."""
    layers = layer_rows(
        model.depth, model.heads, model.cross_attention_frequency, source="bert.", text=True
    )
    cls = "cls.predictions"
    return (
        *(
            row
            for row in layers
            if "cross_attention" not in row.target and "query_" not in row.target
        ),
        Row("bert.embeddings.position_embeddings.weight", "qformer/embeddings/positions"),
        *norm("bert.embeddings.LayerNorm", "qformer/embeddings/norm"),
        *linear(f"{cls}.transform.dense", "language_head/dense"),
        *norm(f"{cls}.transform.LayerNorm", "language_head/norm"),
    )


FROM_BERT_WORDS = (
    ("qformer/embeddings/words", "bert.embeddings.word_embeddings.weight"),
    ("language_head/bias", "cls.predictions.bias"),
)
"""(path, tensor) of the leaves whose first rows are BERT's and whose others are fresh."""


def from_bert(
    source: Mapping[str, np.ndarray], model: ContrastModel, fresh: Mapping[str, Any]
) -> dict[str, Any]:
    """A Q-Former as BLIP-2 starts it: BERT's layers, its feed-forward copied to the queries.

    Cross-attention, queries, projections and the rows of added words keep their fresh values.

    Args:
      source: an opened bert-base-uncased with its language head.
      model: names the sizes.
      fresh: freshly drawn parameters of `model`, as arrays.

    Returns:
      the whole tree.

    Raises:
      UserError: missing tensors or other sizes.
    """
    start = rules.flatten(fresh)
    drop = [Drop(r".*", "not in this table; word rows follow below")]
    table = named_as(from_bert_rows(model), source)
    filled, _ = import_tree(table, source, fresh, drop=drop, fresh=(".*",))
    filled = rules.flatten(filled)
    copies = {
        path.replace("/text_feed_forward", "/query_feed_forward"): leaf
        for path, leaf in filled.items()
        if "/text_feed_forward" in path
    }
    words = {
        path: _first_rows(np.asarray(start[path]), np.asarray(source[name]), path)
        for path, name in FROM_BERT_WORDS
    }
    return rules.unflatten({**start, **filled, **copies, **words})


def _first_rows(longer: np.ndarray, shorter: np.ndarray, path: str) -> np.ndarray:
    if len(longer) < len(shorter):
        raise UserError(f"{len(shorter)} rows do not fit {len(longer)}", field=path)
    return np.concatenate([shorter, longer[len(shorter) :]])


def recognize(checkpoint: Checkpoint) -> bool:
    """Whether the tensors are those of BLIP-2: LAVIS stage 1 or 2, or Hugging Face."""
    if "video_query_tokens" in checkpoint:
        return False
    lavis = f"{LAVIS}embeddings.LayerNorm.weight" in checkpoint
    return lavis or blip2_hugging_face.missing_start(checkpoint) is not None


def options(checkpoint: Checkpoint | None, size: str) -> dict[str, Any]:
    """Layout and sizes.

    Returns:
      `kind` 'lavis' or 'hf'; `text`: with text branch and stage-1 heads; `adapter`: with the
      projection to an LLM; `vision`: fields of the vision encoder or None; `interface`: fields of
      the Q-Former's network; `alone`: 'vision_model.' or 'qformer.' where the file holds that
      network of Hugging Face's alone.

    Raises:
      UserError: unknown size, or a file without the tensors that tell it.
    """
    if checkpoint is None:
        row = sizes.row(interfaces.SIZES, size)
        return dict(kind="lavis", text=False, adapter=True, vision=None, interface=row)
    start = blip2_hugging_face.missing_start(checkpoint)
    if start:
        return _alone(blip2_hugging_face.whole(checkpoint), start, size)
    kind = "lavis" if start is None else "hf"
    adapter = ("language_projection" if kind == "hf" else "opt_proj") + ".weight"
    text = "itm_head.weight" in checkpoint and adapter not in checkpoint
    known = _known(checkpoint, kind, text)
    if adapter in checkpoint:
        known["llm_width"] = sizes.axis(checkpoint, adapter, 0)
    width = sizes.axis(checkpoint, "query_tokens", -1)
    table = contrast_model.SIZES if text else interfaces.SIZES
    row = sizes.row(table, size, width=width) | known
    seen = sizes.row(vit.SIZES, size, width=known["encoder_width"])
    if kind == "hf":
        row |= blip2_hugging_face.qformer_fields(checkpoint) or {}
        fields, norm = blip2_hugging_face.vision_fields(checkpoint) or (seen, {})
        seen, row = fields, row | norm
    elif VISION_MARK[kind] in checkpoint:
        eva_vit.check_depth(checkpoint, seen["depth"], VISION["lavis"])
    sizes.check_named(table, size, row)
    sizes.check_named(vit.SIZES, size, seen if VISION_MARK[kind] in checkpoint else {})
    return {
        "kind": kind,
        "text": text,
        "adapter": adapter in checkpoint,
        "vision": seen if VISION_MARK[kind] in checkpoint else None,
        "interface": row,
    }


def options_of(base: Base) -> dict[str, Any]:
    """Layout and sizes from a base's parameters: LAVIS' names, of the stage that it is of."""
    interface = base_sizes.interface(base, "image_interface")
    text = "image_interface/match_head/kernel" in base
    return dict(kind="lavis", text=text, adapter=not text, vision=None, interface=interface)


def _known(checkpoint: Checkpoint, kind: str, text: bool) -> dict[str, int]:
    """Fields of the Q-Former's network that any file of a layout shows."""
    hf = kind == "hf"
    norm_name = blip2_hugging_face.NORM if hf else "ln_vision.weight"
    known = {
        "queries": sizes.axis(checkpoint, "query_tokens", -2),
        "encoder_width": sizes.axis(checkpoint, norm_name, 0),
    }
    if text:
        start = "embeddings" if hf else f"{LAVIS}embeddings"
        known["vocabulary"] = sizes.axis(checkpoint, f"{start}.word_embeddings.weight", 0)
        known["positions"] = sizes.axis(checkpoint, f"{start}.position_embeddings.weight", 0)
        head = "text_projection" if hf else "text_proj"
        known["embed"] = sizes.axis(checkpoint, f"{head}.weight", 0)
    return known


def _alone(checkpoint: Checkpoint, start: str, size: str) -> dict[str, Any]:
    """Options of a vision model or a Q-Former that stands alone, under the whole model's names."""
    found = dict(kind="hf", text=False, adapter=False, alone=start)
    if start == VISION["hf"]:
        width = sizes.axis(checkpoint, blip2_hugging_face.NORM, 0)
        row = sizes.row(vit.SIZES, size, width=width)
        vision, norm = blip2_hugging_face.vision_fields(checkpoint) or (row, {})
        sizes.check_named(vit.SIZES, size, vision)
        return found | dict(vision=vision, interface={"encoder_width": width} | norm)
    width = sizes.axis(checkpoint, blip2_hugging_face.MARKS[""], 0)
    row = sizes.row(interfaces.SIZES, size, width=width)
    fields = row | (blip2_hugging_face.qformer_fields(checkpoint) or {})
    sizes.check_named(interfaces.SIZES, size, fields)
    return found | dict(vision=None, interface=fields)


def plan(options: Mapping[str, Any]) -> ConversionPlan:
    """Part 'image_interface', and 'vision_encoder' where the file holds it."""
    kind, text, alone = options["kind"], options["text"], options.get("alone", "")
    model = (ContrastModel if text else QFormerInterface)(**options["interface"])
    table, shapes = _interface(options, model), sizes.shapes_of(model)
    fresh = ("language_head/.*", "temperature") if kind == "hf" and text else ("adapter/.*",)
    if alone:  # the other networks' parameters are no part of the base
        held = "norm/" if alone == VISION["hf"] else "qformer/"
        table = tuple(row for row in table if row.target.startswith(held))
        shapes = {name: tree for name, tree in shapes.items() if f"{name}/" == held}
    table, shapes = mount("image_interface", table), {"image_interface": shapes}
    drop = DROP if text else (*DROP, *DROP_TEXT)
    if options["vision"]:
        seen = vit.VisionTransformer(**options["vision"])
        make = eva_vit.hf_rows if kind == "hf" else eva_vit.rows
        table += make(seen.depth, seen.heads, source=VISION[kind], target="vision_encoder/")
        shapes["vision_encoder"] = sizes.shapes_of(seen)
        drop = (
            *eva_vit.drop(seen.depth, VISION[kind]),
            *(d for d in drop if "visual_" not in d.pattern),
        )
    head = "Qformer.cls.predictions"
    tied = {f"{DECODER}.weight": WORDS, f"{DECODER}.bias": f"{head}.bias"} if text else {}
    return ConversionPlan(
        table=table,
        shapes=shapes,
        drop=drop,
        fresh=tuple(f"image_interface/{pattern}" for pattern in fresh),
        tied=tied if kind == "lavis" else {},
        fields={
            "image_interface": told(options["interface"]),
            "vision_encoder": told(options["vision"] or {}),
        },
    )


def _interface(
    options: Mapping[str, Any], model: ContrastModel | QFormerInterface
) -> tuple[Row, ...]:
    """Rows of the Q-Former's network, with its heads or its adapter."""
    kind, text = options["kind"], options["text"]
    table = rows(model.depth, model.heads, model.cross_attention_frequency, kind, text)
    table += head_rows(kind) if text else ()
    projection = "language_projection" if kind == "hf" else "opt_proj"
    return table + (linear(projection, "adapter") if options["adapter"] else ())


def prepare(checkpoint: Checkpoint, options: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint under the names of the whole model."""
    return blip2_hugging_face.whole(checkpoint) if options.get("alone") else checkpoint


def restore(tensors: Mapping[str, Any], options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Exported tensors under the names of a network that stands alone, where it came so."""
    start = options.get("alone", "")
    if not start:
        return tensors
    derived = {
        name.removeprefix(start): Derived((name,), header.shape, header.dtype, lambda x: x)
        for name in tensors
        for header in [tensors.header(name)]
    }
    return View(tensors, derived)
