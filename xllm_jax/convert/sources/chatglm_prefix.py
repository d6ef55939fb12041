"""P-Tuning v2 prefixes of ChatGLM-6B to `models/glm_prefix.py` and back.

The published training script saves the prefix encoder alone: a table `[P, layers * 2 * width]`,
or with `prefix_projection` a table `[P, width]` and the two linear maps that make the former of it.
The projection is computed on import, since nothing but its result is used after training; what is
exported is the plain form.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from xllm_jax.convert import ConversionPlan, Drop, Row, mount, published_config, sizes
from xllm_jax.convert.base_sizes import Base
from xllm_jax.convert.files import Checkpoint, Derived, View
from xllm_jax.core.errors import UserError
from xllm_jax.models.glm_prefix import SIZES, Prefix

PART = "llm_prefix"
ENCODER = "transformer.prefix_encoder."
TABLE = f"{ENCODER}embedding.weight"
PROJECTION = tuple(f"{ENCODER}trans.{n}.{kind}" for n in (0, 2) for kind in ("weight", "bias"))

DROP = (
    Drop(
        r"(lm_head|transformer\.(layers|word_embeddings|final_layernorm|rotary_emb))\..*",
        "the LLM has a table of its own",
    ),
)


def rows(depth: int, heads: int) -> tuple[Row, ...]:
    """The table: a row of the source is a virtual token, layer by layer its key, then its value."""
    axes = (("l", depth), ("c", 2), ("h", heads))
    return (Row(TABLE, "states", "p (l c h k) -> l c p h k", sizes=axes),)


def recognize(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint holds a prefix encoder of ChatGLM."""
    return TABLE in checkpoint


def options(checkpoint: Checkpoint | None, size: str) -> dict[str, Any]:
    """Sizes of the prefix and of the LLM it belongs to.

    Args:
      checkpoint: the file; the LLM's sizes are read from a config.json beside it. None exports a
        prefix of our own.
      size: a row of `models/glm_prefix.py`'s SIZES, instead of a config.json; '' is the
        published one.

    Raises:
      UserError: an unknown size, or a prefix that does not fit the LLM.
    """
    row = sizes.row(SIZES, size)
    if checkpoint is None:
        return row | {"projected": False}
    if not size:
        row |= _sizes_beside(checkpoint)
    projected = any(name in checkpoint for name in PROJECTION)
    length = _check(checkpoint, row, projected)
    return row | {"length": length, "projected": projected}


def options_of(base: Base) -> dict[str, Any]:
    """Sizes of a prefix from a base's parameters."""
    depth, _, length, heads, one = (base.axis(f"{PART}/states", number) for number in range(5))
    return dict(length=length, depth=depth, width=heads * one, heads=heads, projected=False)


def plan(options: Mapping[str, Any]) -> ConversionPlan:
    """The part 'llm_prefix' of one length for one LLM."""
    model = Prefix(*(options[name] for name in ("length", "depth", "width", "heads")))
    table = mount(PART, rows(model.depth, model.heads))
    return ConversionPlan(table=table, shapes={PART: sizes.shapes_of(model)}, drop=DROP)


def prepare(checkpoint: Checkpoint, options: Mapping[str, Any]) -> Mapping:
    """The checkpoint with the plain table of its prefix, whichever form it holds."""
    if not options["projected"]:
        return checkpoint
    shape = (options["length"], 2 * options["depth"] * options["width"])
    dtype = checkpoint.header(TABLE).dtype
    derived = Derived((TABLE, *PROJECTION), shape, dtype, project)
    return View(checkpoint, {TABLE: derived})


def project(table: np.ndarray, *maps: np.ndarray) -> np.ndarray:
    """What the reference's prefix encoder makes of its table, computed in float32.

    Args:
      table: `[P, width]`.
      *maps: PROJECTION: weight `[width, width]` and bias, then, behind a tanh, weight
        `[layers * 2 * width, width]` and bias.

    Returns:
      `[P, layers * 2 * width]` in the table's dtype.
    """
    weight, bias, weight_2, bias_2 = (x.astype(np.float32) for x in maps)
    x = np.tanh(table.astype(np.float32) @ weight.T + bias)
    return (x @ weight_2.T + bias_2).astype(table.dtype)


def _sizes_beside(checkpoint: Checkpoint) -> dict[str, int]:
    """The LLM's sizes from a ChatGLM's config.json beside the file, or nothing."""
    config = published_config.read(checkpoint, {}, ("chatglm",))
    names = {"depth": "num_layers", "width": "hidden_size", "heads": "num_attention_heads"}
    if config is None or not config.said >= set(names.values()):
        return {}
    config.agree(
        pre_seq_len=sizes.axis(checkpoint, TABLE, 0),
        prefix_projection=any(name in checkpoint for name in PROJECTION),
    )
    found = {ours: config.values[theirs] for ours, theirs in names.items()}
    return found | {"heads": config.heads(found["width"])}


def _check(checkpoint: Checkpoint, row: Mapping[str, int], projected: bool) -> int:
    """The prefix' length, after a look at every shape."""
    width, whole = row["width"], 2 * row["depth"] * row["width"]
    wanted = {TABLE: (width if projected else whole,)}
    if projected:
        wanted |= zip(PROJECTION, ((width, width), (width,), (whole, width), (whole,)))
    for name, shape in wanted.items():
        if name not in checkpoint:
            raise UserError(
                "the checkpoint has no such tensor", field=name, hint="A projected prefix has five"
            )
        found = checkpoint.header(name).shape
        if found[name == TABLE :] != shape:
            raise UserError(
                f"shape {found} does not fit an LLM of {row['depth']} layers and width {width}",
                field=checkpoint.where(name),
                hint="Put the LLM's config.json beside the file, or give its --size",
            )
    return checkpoint.header(TABLE).shape[0]
