"""The text encoder of a pipeline's folder, to `models/clip_text.py`: `clip_text.py`'s table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xllm_jax.convert import Row, base_sizes
from xllm_jax.convert.files import Checkpoint
from xllm_jax.convert.sources import clip_text
from xllm_jax.models.clip_text import SIZES, ClipText

KIND, MARK = "CLIPTextModel", "text_encoder/embeddings/words"
UNSEEN = ("epsilon", "activation", "end")


def rows(model: ClipText, options: Mapping[str, Any]) -> tuple[Row, ...]:
    """The table; arguments as of the other parts' tables."""
    return clip_text.rows(model.depth, model.heads, source=options["prefix"])


def network(options: Mapping[str, Any]) -> ClipText:
    """The network of such options, in float32."""
    return ClipText(**options["fields"])


def unseen(model: ClipText) -> dict[str, Any]:
    """Those fields that no shape shows."""
    return {name: getattr(model, name) for name in UNSEEN}


def recognize(checkpoint: Checkpoint) -> bool:
    """Whether the tensors are those of CLIP's text tower alone."""
    starts = (p for p in clip_text.PREFIXES if f"{p}{clip_text.WORDS}" in checkpoint)
    return any(f"{start}final_layer_norm.weight" in checkpoint for start in starts) and not any(
        name.startswith(("vision_model.", "logit_scale")) for name in checkpoint
    )


def described(checkpoint: Checkpoint, size: str) -> dict[str, Any]:
    """`fields` of `ClipText`, and what the tensors' names begin with.

    Args:
      checkpoint: the part alone, with its config.json.
      size: is not asked for: config.json tells all.

    Raises:
      UserError: as of `clip_text.fields`.
    """
    return {"fields": clip_text.fields(checkpoint), "prefix": clip_text.prefix(checkpoint)}


def measured(base: base_sizes.Base, part: str) -> dict[str, Any]:
    """`described` of a base's parameters; the activation is that of the size that has its width."""
    fields: dict[str, Any] = base_sizes.stack(base, f"{part}/layers") | {
        "vocabulary": base.axis(f"{part}/embeddings/words", 0),
        "positions": base.axis(f"{part}/embeddings/positions", 0),
    }
    row = next((r for r in SIZES.values() if r["width"] == fields["width"]), {})
    told = {name: row[name] for name in UNSEEN if name in row}
    return {"fields": fields | told, "prefix": clip_text.PREFIXES[0]}


def config_of(model: ClipText, options: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a network; the inverse of `described`."""
    return {
        "architectures": [KIND],
        "eos_token_id": clip_text.OLD_END if model.end is None else model.end,
        "hidden_act": model.activation,
        "hidden_size": model.width,
        "intermediate_size": model.hidden,
        "layer_norm_eps": model.epsilon,
        "max_position_embeddings": model.positions,
        "model_type": "clip_text_model",
        "num_attention_heads": model.heads,
        "num_hidden_layers": model.depth,
        "projection_dim": model.width,
        "vocab_size": model.vocabulary,
    }
