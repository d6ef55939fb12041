"""Whisper's encoder, as Hugging Face and as OpenAI name it, to `models/whisper.py`.

Folders of `WhisperForConditionalGeneration` and `WhisperModel`, whose decoder is left out, and of
the encoder alone; OpenAI's .pt files. Sizes are told by the shapes, heads and activation by
config.json, without which the size must be a published one.
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
HUGGING_FACE = dict(
    positions="embed_positions.weight",
    layers="layers",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    out="self_attn.out_proj",
    attention_norm="self_attn_layer_norm",
    feed_forward_norm="final_layer_norm",
    up="fc1",
    down="fc2",
    norm_behind="layer_norm",
)
OPENAI = dict(
    positions="positional_embedding",
    layers="blocks",
    query="attn.query",
    key="attn.key",
    value="attn.value",
    out="attn.out",
    attention_norm="attn_ln",
    feed_forward_norm="mlp_ln",
    up="mlp.0",
    down="mlp.2",
    norm_behind="ln_post",
)
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
    depth: int,
    heads: int,
    *,
    source: str = "model.encoder.",
    target: str = "",
    names: Mapping[str, str] = HUGGING_FACE,
) -> tuple[Row, ...]:
    """The table.

    Args:
      depth, heads: sizes of the encoder.
      source: what the tensors' names start with, one of PREFIXES.
      target: what our paths start with.
      names: HUGGING_FACE or OPENAI.
    """
    layers = tuple(range(depth))
    old, new = f"{source}{names['layers']}.{{layer}}.", f"{target}layers"
    projections = [
        row
        for name in ("query", "key", "value")
        for row in heads_in(
            f"{old}{names[name]}", f"{new}/attention/{name}", heads, layers, bias=name != "key"
        )
    ]
    norms = [
        row
        for name in ("attention_norm", "feed_forward_norm")
        for row in norm(f"{old}{names[name]}", f"{new}/{name}", layers)
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
        Row(f"{source}{names['positions']}", f"{target}positions"),
        *projections,
        *heads_out(f"{old}{names['out']}", f"{new}/attention/out", heads, layers),
        *norms,
        *linear(f"{old}{names['up']}", f"{new}/feed_forward/up", layers),
        *linear(f"{old}{names['down']}", f"{new}/feed_forward/down", layers),
        *norm(f"{source}{names['norm_behind']}", f"{target}norm_behind"),
    )


def _layouts(checkpoint: Checkpoint) -> list[tuple[str, bool]]:
    """(what the names start with, whether they are OpenAI's) of the encoders in a file."""
    return [
        (start, openai)
        for start in PREFIXES
        for openai in (False, True)
        if f"{start}{_names(openai)['positions']}" in checkpoint
        and f"{start}conv2.weight" in checkpoint
    ]


def _names(openai: bool) -> dict[str, str]:
    return OPENAI if openai else HUGGING_FACE


def recognize(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint holds Whisper's encoder."""
    return bool(_layouts(checkpoint))


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
    found = _layouts(checkpoint)
    if not found:
        raise UserError(
            "holds no encoder of Whisper",
            field=str(checkpoint.path),
            hint="Give a folder such as openai/whisper-large-v3, or OpenAI's large-v3.pt",
        )
    known = {name: _plain(one) for name, one in SIZES.items()}
    prefix, openai = found[0]
    row = _sizes(checkpoint, prefix, openai, known, size)
    sizes.check_named(known, size, row)
    return {"prefix": prefix, "sizes": row} | ({"openai": True} if openai else {})


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
    names = _names(options.get("openai", False))
    table = rows(model.depth, model.heads, source=options["prefix"], names=names)
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
    checkpoint: Checkpoint,
    prefix: str,
    openai: bool,
    known: Mapping[str, Mapping[str, Any]],
    size: str,
) -> dict[str, Any]:
    """Fields of `WhisperEncoder`: by the shapes, config.json, or a known row."""
    names = _names(openai)
    table, start, up = (
        f"{prefix}{names['positions']}",
        f"{prefix}{names['layers']}.",
        f".{names['up']}",
    )
    positions, width = (sizes.axis(checkpoint, table, n) for n in (0, 1))
    fields = dict(
        bins=sizes.axis(checkpoint, f"{prefix}conv1.weight", 1),
        width=width,
        depth=sum(n.startswith(start) and n.endswith(f"{up}.weight") for n in checkpoint),
        hidden=sizes.axis(checkpoint, f"{start}0{up}.bias", 0),
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
