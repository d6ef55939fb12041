"""THUDM/chatglm-6b (sharded `pytorch_model-*.bin`, config.json) to `models/glm.py` and back.

Also its safetensors form, both vocabularies, and the INT8 and INT4 releases, which are dequantized
(`chatglm_quantized.py`). P-Tuning prefixes have a table of their own (`chatglm_prefix.py`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from xllm_jax.convert import (
    ConversionPlan,
    Drop,
    Row,
    bounds,
    files,
    mount,
    published_config,
    sizes,
)
from xllm_jax.convert.base_sizes import Base
from xllm_jax.convert.sources import chatglm_quantized
from xllm_jax.core.errors import UserError
from xllm_jax.data.text.glm_layout import Specials
from xllm_jax.models.glm import SIZES, ChatGLM

HEAD = "lm_head.weight"
WORDS = "transformer.word_embeddings.weight"
UP = "transformer.layers.0.mlp.dense_h_to_4h.bias"
NORM = "transformer.final_layernorm.weight"
EXTRA_FILES = ("config.json", "ice_text.model", "tokenizer_config.json")

DROP = (
    Drop(r"lm_head\.weight", "tied to the word embeddings, as the reference does on loading"),
    Drop(r"transformer\.prefix_encoder\..*", "a P-Tuning prefix, converted by itself"),
    Drop(r"transformer\.(layers\.\d+\.attention\.)?rotary_emb.*\.inv_freq", "computed, not read"),
)
KEPT = "packed"  # the option: integer weights of the layers stay integers
SCALES = chatglm_quantized.SCALE.removeprefix(chatglm_quantized.WEIGHT)
BITS = ("quantized", "quantised")  # the option's name, and as older conversion.json spell it


def rows(depth: int, heads: int) -> tuple[Row, ...]:
    """The table: query, key and value stand interleaved per head in the source."""
    layers = tuple(range(depth))
    split = (("h", heads), ("c", 3))

    def layer(source: str, target: str, pattern: str = "", sizes: tuple = ()) -> Row:
        return Row(
            f"transformer.layers.{{layer}}.{source}", f"layers/{target}", pattern, layers, sizes
        )

    def norm(source: str, target: str) -> tuple[Row, Row]:
        return layer(f"{source}.weight", f"{target}/scale"), layer(
            f"{source}.bias", f"{target}/bias"
        )

    def dense(source: str, target: str) -> tuple[Row, Row]:
        kernel = layer(f"{source}.weight", f"{target}/kernel", "o i -> i o")
        return kernel, layer(f"{source}.bias", f"{target}/bias")

    return (
        Row(WORDS, "embedding"),
        *norm("input_layernorm", "attention_norm"),
        layer(
            "attention.query_key_value.weight",
            "attention/qkv/kernel",
            "(h c k) d -> d c h k",
            split,
        ),
        layer("attention.query_key_value.bias", "attention/qkv/bias", "(h c k) -> c h k", split),
        layer("attention.dense.weight", "attention/out/kernel", "d (h k) -> h k d", split[:1]),
        layer("attention.dense.bias", "attention/out/bias"),
        *norm("post_attention_layernorm", "feed_forward_norm"),
        *dense("mlp.dense_h_to_4h", "feed_forward/up"),
        *dense("mlp.dense_4h_to_h", "feed_forward/down"),
        Row(NORM, "final_norm/scale"),
        Row("transformer.final_layernorm.bias", "final_norm/bias"),
    )


def read_config(folder: str | Path) -> dict[str, Any]:
    """Reads `config.json` of a checkpoint folder.

    Raises:
      UserError: no such file, or not a ChatGLM configuration.
    """
    path = Path(folder) / "config.json"
    if not path.exists():
        raise UserError("no such file", field=str(path), hint="Give the checkpoint's folder")
    config = bounds.read_json(path)
    if not isinstance(config, dict):
        raise UserError("is not a configuration", field=str(path), hint="Download it again")
    missing = {"vocab_size", "hidden_size", "num_layers", "num_attention_heads"} - config.keys()
    if missing:
        raise UserError(
            f"no {sorted(missing)[0]!r} in it",
            field=str(path),
            hint="This is not the configuration of ChatGLM-6B",
        )
    if not config.get("position_encoding_2d", True):
        raise UserError("one-dimensional positions are not supported", field=str(path))
    return config


def fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `ChatGLM` from a checkpoint's config.json.

    The key `residual_alpha` is ours, for models that were trained with another factor than the
    reference's; published files do not have it.
    """
    return dict(
        vocab=config["vocab_size"],
        width=config["hidden_size"],
        depth=config["num_layers"],
        heads=config["num_attention_heads"],
        hidden=config.get("inner_hidden_size") or 4 * config["hidden_size"],
        norm_epsilon=config.get("layernorm_epsilon", 1e-5),
        alpha=config.get("residual_alpha"),
    )


def config_of(model: ChatGLM, specials: Specials) -> dict[str, Any]:
    """The config.json of a model; the inverse of `fields`, with the special ids."""
    config = {
        "model_type": "chatglm",
        "vocab_size": model.vocab,
        "hidden_size": model.width,
        "num_layers": model.depth,
        "num_attention_heads": model.heads,
        "inner_hidden_size": model.hidden,
        "layernorm_epsilon": model.norm_epsilon,
        "position_encoding_2d": True,
        "bos_token_id": specials.sop,
        "eos_token_id": specials.eop,
        "mask_token_id": specials.mask,
        "gmask_token_id": specials.gmask,
        "pad_token_id": specials.pad,
    }
    return config if model.alpha is None else config | {"residual_alpha": model.alpha}


def recognize(checkpoint: files.Checkpoint) -> bool:
    """Whether the tensors are those of ChatGLM-6B."""
    return WORDS in checkpoint


def options(checkpoint: files.Checkpoint | None, size: str) -> dict[str, Any]:
    """Fields of `ChatGLM`, from config.json, a SIZES row or the shapes.

    A quantized release also has `quantized`, the bits of each weight.

    Raises:
      UserError: unknown size, or a config.json of another model.
    """
    if checkpoint is None:
        return sizes.row(SIZES, size)
    model = _fields_of(checkpoint, size)
    _check_heads(checkpoint, model["width"], model["heads"])
    bits = chatglm_quantized.bits_of(checkpoint, model["width"], model["hidden"])
    return model | ({BITS[0]: bits} if bits else {})


def options_of(base: Base) -> dict[str, Any]:
    """Fields of `ChatGLM` from a base's parameters."""
    qkv = "llm/layers/attention/qkv/kernel"  # [depth, width, 3, heads, head width]
    return dict(
        vocab=base.axis("llm/embedding", 0),
        width=base.axis(qkv, 1),
        depth=base.axis(qkv, 0),
        heads=base.axis(qkv, 3),
        hidden=base.axis("llm/layers/feed_forward/up/kernel", 2),
    )


def network(options: Mapping[str, Any]) -> ChatGLM:
    """The model of such options, in float32."""
    own = (*BITS, KEPT)
    return ChatGLM(**{key: value for key, value in options.items() if key not in own})


def packed_options(options: Mapping[str, Any], checkpoint: files.Checkpoint) -> dict[str, Any]:
    """Options with which the layers' integer weights stay integers.

    Raises:
      UserError: the release is not quantized, or some of its layers are not.
    """
    bits = options.get(BITS[0], {})
    table = chatglm_quantized.packed_rows(rows(options["depth"], options["heads"]), bits)
    if table is None:
        what = "not every layer holds integers of as many bits"
        raise UserError(what, field=str(checkpoint.path), hint="Leave --keep_packed out")
    return {**options, KEPT: True}


def plan(options: Mapping[str, Any]) -> ConversionPlan:
    """The whole source as part 'llm'; configuration and tokenizer go beside it."""
    model = network(options)
    table, made = rows(model.depth, model.heads), sizes.shapes_of(model)
    kept = options.get(KEPT) and chatglm_quantized.packed_rows(table, options[BITS[0]])
    if kept:
        made = chatglm_quantized.packed_shapes(table, options[BITS[0]], made)
        table = kept
    return ConversionPlan(
        table=mount("llm", table),
        shapes={"llm": made},
        integers=chatglm_quantized.integers(kept or ()),
        drop=tuple(rule for rule in DROP if rule.pattern != re.escape(HEAD)),
        tied={HEAD: WORDS},
        extra_files=EXTRA_FILES,
        fields={"llm": {"norm_epsilon": model.norm_epsilon, "alpha": model.alpha}},
    )


def prepare(checkpoint: files.Checkpoint, options: Mapping[str, Any]) -> Mapping:
    """The checkpoint with integer weights as floats."""
    kept = options.get(KEPT) and chatglm_quantized.packed_rows(
        rows(options["depth"], options["heads"]), options[BITS[0]]
    )
    names = chatglm_quantized.integers(kept or ())
    return chatglm_quantized.view(checkpoint, options["width"], options["hidden"], names)


def restore(tensors: Mapping[str, np.ndarray], options: Mapping[str, Any]) -> Mapping:
    """Exported tensors with the weights of a quantized release back in their integers."""
    bits = next((options[name] for name in BITS if options.get(name)), {})
    bits = {name: count for name, count in bits.items() if name + SCALES not in tensors}
    return chatglm_quantized.restore(tensors, bits) if bits else tensors


def _check_heads(checkpoint: files.Checkpoint, width: int, heads: int) -> None:
    """Weights do not tell the heads; rotary buffers do: a frequency for 4 of a head's width."""
    for name in checkpoint:
        if not name.endswith("rotary_emb.inv_freq"):
            continue
        told = 4 * sizes.axis(checkpoint, name, 0) * heads
        if told != width:
            raise UserError(
                f"its frequencies are not those of {heads} heads at width {width}",
                field=checkpoint.where(name),
                hint="Correct num_attention_heads in config.json",
            )


def _fields_of(checkpoint: files.Checkpoint, size: str) -> dict[str, Any]:
    # Quantized embeddings pack two columns into one; the scales of a norm are never quantized.
    vocab, width = sizes.axis(checkpoint, WORDS, 0), sizes.axis(checkpoint, NORM, 0)
    config = published_config.read(checkpoint, {}, ("chatglm",))
    if config is None:
        return sizes.row(SIZES, size, vocab=vocab, width=width)
    found = fields(read_config(checkpoint.config_file().parent))
    hidden = sizes.axis(checkpoint, UP, 0)
    config.agree(
        vocab_size=vocab,
        hidden_size=width,
        num_layers=sizes.depth(checkpoint, r"transformer\.layers\.(\d+)\..*"),
        inner_hidden_size=hidden,
    )
    found |= {"hidden": hidden, "heads": config.heads(width)}
    if "layernorm_epsilon" in config.said:
        found["norm_epsilon"] = config.epsilon("layernorm_epsilon")
    return sizes.fitting(SIZES, size, checkpoint, **found) if size else found
