"""The text encoder of Stable Diffusion (transformers' `CLIPTextModel`) to `models/clip_text.py`.

Published folders name the tensors `text_model.…`, those that transformers 5 writes have no such
beginning. Sizes are told by the shapes; heads, activation and epsilon by config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xllm_jax.convert import Drop, Row, published_config, sizes
from xllm_jax.convert.files import Checkpoint
from xllm_jax.convert.sources import clip_vision
from xllm_jax.convert.sources.bert import norm
from xllm_jax.core.errors import UserError
from xllm_jax.models.clip_text import ClipText

PREFIXES = ("text_model.", "")
WORDS = "embeddings.token_embedding.weight"
DEFAULTS = clip_vision.DEFAULTS | dict(num_attention_heads=8, eos_token_id=49407)
"""Of transformers' CLIPTextConfig."""
OLD_END = 2  # a wrong number of old files, which transformers takes for the largest id
KINDS = ("clip", "clip_text_model")
DROP = (
    Drop(r".*embeddings\.position_ids", "the numbers 0, 1, 2 …"),
    Drop(r"text_projection\.weight", "the projection into CLIP's shared space"),
)


def rows(
    depth: int, heads: int, *, source: str = "text_model.", target: str = ""
) -> tuple[Row, ...]:
    """Table of Hugging Face's files.

    Args:
      depth, heads: sizes of the tower.
      source: what the tensors' names start with, one of PREFIXES.
      target: what our paths start with.
    """
    return (
        Row(f"{source}{WORDS}", f"{target}embeddings/words"),
        Row(f"{source}embeddings.position_embedding.weight", f"{target}embeddings/positions"),
        *clip_vision.stack(f"{source}encoder.layers", f"{target}layers", depth, heads),
        *norm(f"{source}final_layer_norm", f"{target}norm_behind"),
    )


def prefix(checkpoint: Mapping[str, Any]) -> str:
    """What the names of a folder's tensors start with.

    Raises:
      UserError: it holds no text encoder of CLIP.
    """
    for start in PREFIXES:
        if f"{start}{WORDS}" in checkpoint:
            return start
    place = str(getattr(checkpoint, "path", "text_encoder"))
    hint = f"A text encoder has {PREFIXES[0]}{WORDS}; give the folder text_encoder"
    raise UserError("is no text encoder of CLIP", field=place, hint=hint)


def fields(checkpoint: Checkpoint) -> dict[str, Any]:
    """Fields of `ClipText`: by the shapes of the tensors, the rest by config.json.

    Raises:
      UserError: no text encoder, no config.json, or one that contradicts the tensors or describes
        what the network does not compute.
    """
    start = prefix(checkpoint)
    config = published_config.read(checkpoint, DEFAULTS, KINDS, "text_config")
    if config is None:
        what = "is missing, and nothing else tells the heads and the activation"
        raise UserError(what, field=str(checkpoint.config_file()), hint="Download it too")
    before, after = f"{start}encoder.layers.", ".layer_norm1.weight"
    vocabulary, width = (sizes.axis(checkpoint, f"{start}{WORDS}", n) for n in (0, 1))
    found = dict(
        vocabulary=vocabulary,
        positions=sizes.axis(checkpoint, f"{start}embeddings.position_embedding.weight", 0),
        width=width,
        depth=sum(name.startswith(before) and name.endswith(after) for name in checkpoint),
        hidden=sizes.axis(checkpoint, f"{before}0.mlp.fc1.bias", 0),
    )
    config.agree(vocab_size=vocabulary, max_position_embeddings=found["positions"])
    told = clip_vision.described(config, ClipText, found)
    told |= published_config.other_than(ClipText, activation=config.activation(), end=end(config))
    return found | told


def end(config: published_config.PublishedConfig) -> int | None:
    """`ClipText.end` as a config.json tells it.

    Raises:
      UserError: it names several tokens.
    """
    told = config.values["eos_token_id"]
    if not isinstance(told, int):
        raise config.refuse("eos_token_id", "one token ends a text")
    return None if told == OLD_END else told
