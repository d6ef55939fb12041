"""BERT checkpoints (`bert-base-uncased`, `bert-base-chinese`) to `models/bert.py` and back.

`attention_rows` and `feed_forward_rows` are shared with the Q-Former's tables, whose layers carry
the same tensors.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp

from xllm_jax.convert import ConversionPlan, Drop, Row, base_sizes, published_config, sizes
from xllm_jax.convert.base_sizes import Base
from xllm_jax.convert.files import Checkpoint
from xllm_jax.core.errors import UserError
from xllm_jax.models.bert import SIZES, BertEncoder

Layers = tuple[int, ...] | None


def linear(source: str, target: str, layers: Layers = None) -> tuple[Row, ...]:
    """Rows of a PyTorch linear layer that becomes a plain dense layer."""
    return (
        Row(f"{source}.weight", f"{target}/kernel", "o i -> i o", layers),
        Row(f"{source}.bias", f"{target}/bias", "", layers),
    )


def norm(source: str, target: str, layers: Layers = None) -> tuple[Row, ...]:
    """Rows of a LayerNorm."""
    return (
        Row(f"{source}.weight", f"{target}/scale", "", layers),
        Row(f"{source}.bias", f"{target}/bias", "", layers),
    )


def attention_rows(
    source: str, target: str, heads: int, layers: Layers, inner: str = "self"
) -> tuple[Row, ...]:
    """Rows of one attention sub-layer: projections, output and the norm behind it.

    Args:
      source: such as 'encoder.layer.{layer}.attention'.
      target: such as 'layers/attention'; the norm goes to '<target>_end/norm'.
      heads: number of heads.
      layers: source layer numbers in stacking order, or None for an unstacked layer.
      inner: name of the projections' module in the source.
    """
    sizes = (("h", heads),)
    rows = []
    for name in ("query", "key", "value"):
        old, new = f"{source}.{inner}.{name}", f"{target}/{name}"
        rows.append(Row(f"{old}.weight", f"{new}/kernel", "(h k) d -> d h k", layers, sizes))
        rows.append(Row(f"{old}.bias", f"{new}/bias", "(h k) -> h k", layers, sizes))
    out = Row(
        f"{source}.output.dense.weight", f"{target}/out/kernel", "d (h k) -> h k d", layers, sizes
    )
    rows += [out, Row(f"{source}.output.dense.bias", f"{target}/out/bias", "", layers)]
    return (*rows, *norm(f"{source}.output.LayerNorm", f"{target}_end/norm", layers))


def feed_forward_rows(
    source: str, target: str, layers: Layers, suffix: str = ""
) -> tuple[Row, ...]:
    """Rows of one feed-forward sub-layer and the norm behind it.

    Args:
      source: such as 'encoder.layer.{layer}'.
      target: such as 'layers/feed_forward'; the norm goes to '<target>_end/norm'.
      layers: as in `attention_rows`.
      suffix: '_query' for the Q-Former's second feed-forward.
    """
    return (
        *linear(f"{source}.intermediate{suffix}.dense", f"{target}/up", layers),
        *linear(f"{source}.output{suffix}.dense", f"{target}/down", layers),
        *norm(f"{source}.output{suffix}.LayerNorm", f"{target}_end/norm", layers),
    )


def rows(
    depth: int,
    heads: int,
    *,
    source: str = "bert.",
    target: str = "",
    words: bool = True,
    pooler: bool = False,
) -> tuple[Row, ...]:
    """Table of a BERT encoder.

    Args:
      depth: number of layers.
      heads: number of heads.
      source: what the tensors' names start with: 'bert.' in files of a model with a task head, ''
        in files of the bare model (`prefix_of` tells).
      target: what our paths start with, such as 'transformer/'.
      words: fill the word table (False: the module runs on embeddings).
      pooler: fill the pooler.
    """
    old, new, layers = f"{source}encoder.layer.{{layer}}", f"{target}layers", tuple(range(depth))
    tables = [
        Row(f"{source}embeddings.{kind}_embeddings.weight", f"{target}embeddings/{name}")
        for kind, name in (("word", "words"), ("position", "positions"), ("token_type", "types"))
        if words or name != "words"
    ]
    return (
        *tables,
        *norm(f"{source}embeddings.LayerNorm", f"{target}embeddings/norm"),
        *attention_rows(f"{old}.attention", f"{new}/attention", heads, layers),
        *feed_forward_rows(old, f"{new}/feed_forward", layers),
        *(linear(f"{source}pooler.dense", f"{target}pooler") if pooler else ()),
    )


def named_as(table: Iterable[Row], names: Iterable[str]) -> tuple[Row, ...]:
    """The table with the names that a file has for scale and bias of its norms.

    The published bert-base files still say 'gamma' and 'beta'; transformers renames them on loading
    and writes 'weight' and 'bias'.
    """
    if not any(name.endswith("LayerNorm.gamma") for name in names):
        return tuple(table)
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}

    def renamed(row: Row) -> Row:
        kind = next((kind for kind in old if row.source.endswith(kind)), None)
        if kind is None:
            return row
        return dataclasses.replace(row, source=row.source.removesuffix(kind) + old[kind])

    return tuple(renamed(row) for row in table)


def prefix_of(names: Iterable[str]) -> str:
    """What the encoder's names in a BERT file start with: 'bert.' or ''.

    Raises:
      UserError: the file holds no BERT encoder.
    """
    pattern = r"(|.*\.)encoder\.layer\.0\.attention\.self\.query\.weight"
    found = {match[1] for name in names if (match := re.fullmatch(pattern, name))}
    found = found & {"", "bert."} or found  # a moving average may stand beside it
    if len(found) != 1:
        raise UserError(
            f"expected one BERT encoder, found {len(found)}",
            hint="Give the folder of a published BERT (pytorch_model.bin or model.safetensors)",
        )
    return found.pop()


UNSEEN = ("activation", "epsilon", "norm_epsilon", "alpha")
DEFAULTS = dict(num_attention_heads=12, hidden_act="gelu", layer_norm_eps=1e-12)
"""Of transformers' BertConfig."""
FIELDS = {
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "hidden": "intermediate_size",
}
TABLES = {
    "vocab_size": "word",
    "max_position_embeddings": "position",
    "type_vocab_size": "token_type",
}
DROP = (
    Drop(r"cls\..*", "heads of BERT's own pre-training"),
    Drop(r".*embeddings\.position_ids", "the numbers 0, 1, 2 …"),
    Drop(r".*pooler\..*", "the pooled vector is not used"),
    Drop(r".*embeddings\.word_embeddings\.weight", "the module runs on embeddings"),
)
"""What a plain encoder may leave out; a table that fills the pooler or words uses them first."""


def recognize(checkpoint: Checkpoint) -> bool:
    """Whether the tensors are those of a plain BERT, with or without heads."""
    return any(
        f"{prefix}embeddings.word_embeddings.weight" in checkpoint
        and f"{prefix}encoder.layer.0.attention.self.query.weight" in checkpoint
        for prefix in ("", "bert.")
    )


def described(
    checkpoint: Checkpoint,
    prefix: str,
    row: Callable[..., dict[str, Any]],
    decoder: bool = False,
) -> dict[str, Any]:
    """Width, depth, heads and so on of a BERT, by its tensors and its config.json.

    Args:
      checkpoint: the opened files.
      prefix: of the encoder's names.
      row: the row of SIZES that fits the measured fields; taken where there is no config.json.
      decoder: it may be one that sees only what stands before a token.

    Raises:
      UserError: config.json contradicts the tensors, or describes what no network here computes.
    """
    layer = f"{prefix}encoder.layer"
    measured = dict(
        width=sizes.axis(checkpoint, f"{prefix}embeddings.word_embeddings.weight", 1),
        depth=sizes.depth(checkpoint, re.escape(layer) + r"\.(\d+)\..*"),
        hidden=sizes.axis(checkpoint, f"{layer}.0.intermediate.dense.bias", 0),
    )
    config = published_config.read(checkpoint, DEFAULTS, ("bert",))
    if config is None:
        return row(**measured)
    tables = {
        field: sizes.axis(checkpoint, f"{prefix}embeddings.{name}_embeddings.weight", 0)
        for field, name in TABLES.items()
    }
    config.only(add_cross_attention=False, **({} if decoder else {"is_decoder": False}))
    config.agree(**tables, **{theirs: measured[ours] for ours, theirs in FIELDS.items()})
    told = dict(activation=config.activation(), epsilon=config.epsilon())
    told = published_config.other_than(BertEncoder, **told)
    return measured | {"heads": config.heads(measured["width"])} | told


def options(checkpoint: Checkpoint | None, size: str) -> dict[str, Any]:
    """Fields of `BertEncoder`, the `prefix` of the names in the file, and whether it says `gamma`.

    Raises:
      UserError: unknown size, or a file without the tensors that tell it.
    """
    if checkpoint is None:
        return sizes.row(SIZES, size) | {"prefix": "bert.", "gamma": False}
    prefix = prefix_of(checkpoint)
    row = functools.partial(sizes.fitting, SIZES, size, checkpoint)
    fields = described(checkpoint, prefix, row)
    if size:
        row(**{name: fields[name] for name in (*FIELDS, "heads")})
    start = f"{prefix}embeddings"
    return fields | {
        "vocabulary": sizes.axis(checkpoint, f"{start}.word_embeddings.weight", 0),
        "positions": sizes.axis(checkpoint, f"{start}.position_embeddings.weight", 0),
        "types": sizes.axis(checkpoint, f"{start}.token_type_embeddings.weight", 0),
        "prefix": prefix,
        "gamma": f"{prefix}embeddings.LayerNorm.gamma" in checkpoint,
    }


def options_of(base: Base) -> dict[str, Any]:
    """Fields of `BertEncoder` from a base's parameters, and the usual names."""
    return base_sizes.bert(base, "bert") | {"prefix": "bert.", "gamma": False}


def told(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Those fields of a network that no shape shows."""
    return {name: value for name, value in fields.items() if name in UNSEEN}


def plan(options: Mapping[str, Any]) -> ConversionPlan:
    """The encoder with its word table as part 'bert'."""
    names = ("prefix", "gamma")
    model = BertEncoder(**{name: value for name, value in options.items() if name not in names})
    ids = jnp.zeros((1, 2), jnp.int32)
    table = rows(model.depth, model.heads, source=options["prefix"], target="bert/")
    return ConversionPlan(
        table=named_as(table, ["LayerNorm.gamma"] if options["gamma"] else []),
        shapes={"bert": sizes.shapes_of(model, ids, jnp.ones((1, 2), bool))},
        drop=tuple(rule for rule in DROP if "word_embeddings" not in rule.pattern),
        extra_files=("vocab.txt",),
        fields={"bert": told(options)},
    )
