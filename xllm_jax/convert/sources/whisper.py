"""Whisper's encoder as Hugging Face names it to `models/whisper.py`.

Folders of `WhisperForConditionalGeneration` and `WhisperModel`, whose decoder is left out, and of
the encoder alone. Sizes are told by the shapes, heads and activation by config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xllm_jax.convert import ConversionPlan, Drop, Row, base_sizes, mount, published_config, sizes
from xllm_jax.convert.base_sizes import Base
from xllm_jax.convert.files import Checkpoint
from xllm_jax.convert.sources.bert import linear, norm, told
from xllm_jax.convert.sources.cif_asr import heads_in, heads_out
from xllm_jax.core.errors import UserError
from xllm_jax.models.whisper import SIZES, WhisperEncoder

PART = "speech_encoder"
PREFIXES = ("model.encoder.", "encoder.", "")
MARK = "embed_positions.weight"
KINDS = ("whisper",)
CONVOLUTION = "o i k -> k i o"
DEFAULTS = dict(
    num_mel_bins=80,
    encoder_layers=4,
    encoder_attention_heads=6,
    encoder_ffn_dim=1536,
    d_model=384,
    activation_function="gelu",
    max_source_positions=1500,
    scale_embedding=False,
)
"""Of transformers' WhisperConfig."""
DROP = (
    Drop(r"(model\.)?decoder\..*|proj_out\.weight", "Whisper's decoder; the LLM writes the text"),
)
FILES = ("preprocessor_config.json",)


def rows(
    depth: int, heads: int, *, source: str = "model.encoder.", target: str = ""
) -> tuple[Row, ...]:
    """The table.

    Args:
      depth, heads: sizes of the encoder.
      source: what the tensors' names start with, one of PREFIXES.
      target: what our paths start with.
    """
    old, new, layers = f"{source}layers.{{layer}}", f"{target}layers", tuple(range(depth))
    projections = [
        row
        for letter, name in (("q", "query"), ("k", "key"), ("v", "value"))
        for row in heads_in(
            f"{old}.self_attn.{letter}_proj",
            f"{new}/attention/{name}",
            heads,
            layers,
            bias=name != "key",
        )
    ]
    convolutions = [
        row
        for number in (1, 2)
        for row in (
            Row(f"{source}conv{number}.weight", f"{target}conv_{number}/kernel", CONVOLUTION),
            Row(f"{source}conv{number}.bias", f"{target}conv_{number}/bias"),
        )
    ]
    return (
        *convolutions,
        Row(f"{source}{MARK}", f"{target}positions"),
        *projections,
        *heads_out(f"{old}.self_attn.out_proj", f"{new}/attention/out", heads, layers),
        *norm(f"{old}.self_attn_layer_norm", f"{new}/attention_norm", layers),
        *norm(f"{old}.final_layer_norm", f"{new}/feed_forward_norm", layers),
        *linear(f"{old}.fc1", f"{new}/feed_forward/up", layers),
        *linear(f"{old}.fc2", f"{new}/feed_forward/down", layers),
        *norm(f"{source}layer_norm", f"{target}norm_behind"),
    )


def _prefixes(checkpoint: Checkpoint) -> list[str]:
    return [
        start
        for start in PREFIXES
        if f"{start}{MARK}" in checkpoint and f"{start}conv2.weight" in checkpoint
    ]


def recognize(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint holds Whisper's encoder."""
    return bool(_prefixes(checkpoint))


def options(checkpoint: Checkpoint | None, size: str) -> dict[str, Any]:
    """How the file names its tensors, and the encoder's fields.

    Args:
      checkpoint: the file; None exports an encoder of our own under the published names.
      size: a row of `models/whisper.py`'s SIZES; '' reads the sizes off the file.

    Raises:
      UserError: an unknown size, no encoder in the file, or a config.json that contradicts it or
        describes what the network does not compute.
    """
    if checkpoint is None:
        return {"prefix": PREFIXES[0], "sizes": _plain(sizes.row(SIZES, size))}
    found = _prefixes(checkpoint)
    if not found:
        raise UserError(
            "holds no encoder of Whisper",
            field=str(checkpoint.path),
            hint="Give a folder such as openai/whisper-large-v3",
        )
    known = {name: _plain(one) for name, one in SIZES.items()}
    row = _sizes(checkpoint, found[0], known, size)
    sizes.check_named(known, size, row)
    return {"prefix": found[0], "sizes": row}


def options_of(base: Base) -> dict[str, Any]:
    """The published names, and the encoder's sizes from a base's parameters."""
    found = dict(
        bins=base.axis(f"{PART}/conv_1/kernel", 1),
        positions=base.axis(f"{PART}/positions", 0),
        **base_sizes.stack(base, f"{PART}/layers"),
    )
    return {"prefix": PREFIXES[0], "sizes": found}


def plan(options: Mapping[str, Any]) -> ConversionPlan:
    """The whole source as part 'speech_encoder'."""
    model = WhisperEncoder(**options["sizes"])
    table = rows(model.depth, model.heads, source=options["prefix"])
    return ConversionPlan(
        table=mount(PART, table),
        shapes={PART: sizes.shapes_of(model)},
        drop=DROP,
        extra_files=FILES,
        fields={PART: told(options["sizes"])},
    )


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of SIZES without what no file tells."""
    return {name: value for name, value in row.items() if name != "stride"}


def _sizes(
    checkpoint: Checkpoint, prefix: str, known: Mapping[str, Mapping[str, Any]], size: str
) -> dict[str, Any]:
    """Fields of `WhisperEncoder`: by the shapes, config.json, or a known row."""
    positions, width = (sizes.axis(checkpoint, f"{prefix}{MARK}", n) for n in (0, 1))
    start = f"{prefix}layers."
    fields = dict(
        bins=sizes.axis(checkpoint, f"{prefix}conv1.weight", 1),
        width=width,
        depth=sum(n.startswith(start) and n.endswith(".fc1.weight") for n in checkpoint),
        hidden=sizes.axis(checkpoint, f"{start}0.fc1.bias", 0),
        positions=positions,
    )
    config = published_config.read(checkpoint, DEFAULTS, KINDS)
    if config is None:
        return sizes.fitting(known, size, checkpoint, **fields)
    config.only(scale_embedding=False)
    names = dict(bins="num_mel_bins", width="d_model", depth="encoder_layers")
    names |= dict(hidden="encoder_ffn_dim", positions="max_source_positions")
    config.agree(**{theirs: fields[ours] for ours, theirs in names.items()})
    activation = config.activation("activation_function")
    special = published_config.other_than(WhisperEncoder, activation=activation)
    return fields | special | {"heads": config.heads(width, "encoder_attention_heads")}
