"""CLIP as a whole, as Hugging Face and as OpenAI name it, to `models/clip.py`.

The vision tower's rows are those of `clip_vision.py`. Reads folders of `CLIPModel`, and OpenAI's
own .pt files. The tokenizer's files are copied beside the base where the folder has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xllm_jax.convert import ConversionPlan, Drop, Row, base_sizes, mount, sizes
from xllm_jax.convert.base_sizes import Base
from xllm_jax.convert.files import Checkpoint
from xllm_jax.convert.sources import clip_text, clip_vision
from xllm_jax.convert.sources.bert import norm
from xllm_jax.models.clip import SIZES, Clip
from xllm_jax.models.clip_text import ClipText

PART = "clip"
TEXT = {
    clip_vision.PUBLISHED: "text_model.final_layer_norm.weight",
    clip_vision.OPENAI: "ln_final.weight",
}
"""The tensor that tells the text tower's layout, by that of the vision tower."""
TOKENIZER = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
NEW_END = 49407  # what transformers supposes where a file says nothing
DROP = tuple(
    Drop(pattern, reason)
    for pattern, reason in (
        (r".*embeddings\.position_ids", "the numbers 0, 1, 2 …"),
        (r"logit_scale", "the temperature of CLIP's loss"),
        (r"input_resolution|context_length|vocab_size", "a size, not a parameter"),
    )
)


def rows(vision: Mapping[str, Any], text: Mapping[str, Any]) -> tuple[Row, ...]:
    """Table of Hugging Face's files; fields of the towers as of `Clip`."""
    return (
        *clip_vision.rows(vision["depth"], vision["heads"], target="vision/"),
        Row("visual_projection.weight", "vision_projection/kernel", "o i -> i o"),
        *clip_text.rows(text["depth"], text["heads"], target="text/"),
        Row("text_projection.weight", "text_projection/kernel", "o i -> i o"),
    )


def openai_rows(vision: Mapping[str, Any], text: Mapping[str, Any]) -> tuple[Row, ...]:
    """Table of the original names; arguments as of `rows`."""
    stack = clip_vision.openai_stack
    return (
        *clip_vision.openai_rows(vision["depth"], vision["heads"], target="vision/"),
        Row("visual.proj", "vision_projection/kernel"),
        Row("token_embedding.weight", "text/embeddings/words"),
        Row("positional_embedding", "text/embeddings/positions"),
        *stack("transformer.resblocks", "text/layers", text["depth"], text["heads"]),
        *norm("ln_final", "text/norm_behind"),
        Row("text_projection", "text_projection/kernel"),
    )


def table(mark: str, size: Mapping[str, Any]) -> tuple[Row, ...]:
    """The table of the layout that has the tensor `mark`, a key of TEXT; fields as of `Clip`."""
    chosen = openai_rows if mark == clip_vision.OPENAI else rows
    return chosen(size["vision_fields"], size["text_fields"])


def recognize(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint holds both towers of CLIP."""
    return any(vision in checkpoint and text in checkpoint for vision, text in TEXT.items())


def options(checkpoint: Checkpoint | None, size: str) -> dict[str, Any]:
    """How the file names its tensors, and the sizes.

    Args:
      checkpoint: the file; None exports a base of our own under the published names.
      size: a row of `models/clip.py`'s SIZES; '' reads the sizes off the file.

    Raises:
      UserError: an unknown size, or another activation than CLIP's.
    """
    if checkpoint is None:
        return {"mark": clip_vision.PUBLISHED, "sizes": sizes.row(SIZES, size)}
    mark = next(one for one, text in TEXT.items() if one in checkpoint and text in checkpoint)
    configured = clip_vision.read_config(checkpoint, "text_config", clip_text.DEFAULTS) is not None
    row = sizes.row(SIZES, size) if size and not configured else _sizes(checkpoint, mark)
    sizes.check_named(SIZES, size, row)
    return {"mark": mark, "sizes": row}


def options_of(base: Base) -> dict[str, Any]:
    """The published names, and the sizes from a base's parameters."""
    text = base_sizes.stack(base, f"{PART}/text/layers") | {
        "vocabulary": base.axis(f"{PART}/text/embeddings/words", 0),
        "positions": base.axis(f"{PART}/text/embeddings/positions", 0),
    }
    found = dict(
        vision_fields=base_sizes.tower(base, f"{PART}/vision"),
        text_fields=text,
        shared=base.axis(f"{PART}/text_projection/kernel", 1),
    )
    return {"mark": clip_vision.PUBLISHED, "sizes": found}


def plan(options: Mapping[str, Any]) -> ConversionPlan:
    """The part 'clip' of one layout and size."""
    made, rows = Clip(**options["sizes"]), table(options["mark"], options["sizes"])
    shapes = {PART: sizes.shapes_of(made)}
    return ConversionPlan(table=mount(PART, rows), shapes=shapes, drop=DROP, extra_files=TOKENIZER)


def _sizes(checkpoint: Checkpoint, mark: str) -> dict[str, Any]:
    """Fields of `Clip` from a file's shapes; heads and end from a config.json, or as published."""
    one = {"depth": 1, "heads": 1}
    first_layer = table(mark, {"vision_fields": one, "text_fields": one})
    source = {row.target: row.source for row in first_layer}

    def axis(target: str, number: int) -> int:
        return sizes.axis(checkpoint, source[target].replace("{layer}", "0"), number)

    config = clip_vision.read_config(checkpoint, "text_config", clip_text.DEFAULTS)
    width = axis("text/embeddings/words", 1)
    start, end = source["text/layers/attention_norm/scale"].split("{layer}")
    text: dict[str, Any] = dict(
        vocabulary=axis("text/embeddings/words", 0),
        positions=axis("text/embeddings/positions", 0),
        width=width,
        depth=sum(name.startswith(start) and name.endswith(end) for name in checkpoint),
        hidden=axis("text/layers/feed_forward/up/bias", 0),
    )
    ending = NEW_END
    if config:
        config.agree(vocab_size=text["vocabulary"], max_position_embeddings=text["positions"])
        ending = clip_text.end(config)
    text |= clip_vision.described(config, ClipText, text)
    text["end"] = None if mark == clip_vision.OPENAI else ending
    projection = next(row for row in first_layer if row.target == "text_projection/kernel")
    return dict(
        vision_fields=clip_vision.options(checkpoint, "")["sizes"],
        text_fields=text,
        shared=axis("text_projection/kernel", 0 if projection.pattern else 1),
    )
