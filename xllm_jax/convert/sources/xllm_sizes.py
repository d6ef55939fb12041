"""Sizes of our interfaces, by name or read off a checkpoint of the X-LLM repository."""

from __future__ import annotations

import re
from collections.abc import Iterable

from xllm_jax.convert import sizes
from xllm_jax.convert.files import Checkpoint
from xllm_jax.models import interfaces, speech_interface
from xllm_jax.models.speech_interface import SpeechInterface

HEAD_WIDTH = 64  # of every published BERT; heads cannot be read off the shapes


def named(part: str, size: str) -> dict[str, int]:
    """Fields of a part's network for a size by name; '' is the published one.

    Raises:
      UserError: unknown size.
    """
    file = speech_interface if part == "speech_interface" else interfaces
    return sizes.row(file.SIZES, size)


def read(part: str, checkpoint: Checkpoint, size: str) -> dict[str, int]:
    """Fields of a part's network: by name where a size is given, else from the file's shapes.

    The LLM's width is always the file's. What a piece that is not in the file would tell is taken
    as in the published model.

    Raises:
      UserError: unknown size.
    """
    adapter = {"image_interface": "opt_proj", "video_interface": "video_proj"}
    adapter = f"{adapter.get(part, 'post_bert_proj')}.weight"
    llm_width, width = (sizes.axis(checkpoint, adapter, number) for number in (0, 1))
    row = named(part, size) | {"llm_width": llm_width}
    if size:
        return row
    row |= {"width": width, "heads": max(1, width // HEAD_WIDTH)}
    shapes = {name: checkpoint.header(name).shape for name in checkpoint}
    if part == "speech_interface":
        return row | _speech(shapes)
    queries = "video_query_tokens" if part == "video_interface" else "query_tokens"
    return row | _read(shapes, queries=(queries, 1)) | _q_former(shapes)


def _q_former(shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
    layer = "Qformer.bert.encoder.layer"
    own = _numbers(shapes, rf"{layer}\.(\d+)\.attention\.self\.query\.weight")
    cross = _numbers(shapes, rf"{layer}\.(\d+)\.crossattention\.self\.query\.weight")
    found = {"depth": len(own)} if own else {}
    found |= {"cross_attention_frequency": cross[1]} if len(cross) > 1 else {}
    return found | _read(
        shapes,
        hidden=(f"{layer}.0.intermediate_query.dense.bias", 0),
        encoder_width=("ln_vision.weight", 0),
    )


def _speech(shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
    layer = "speech_bert_adaptor.encoder.layer"
    own = _numbers(shapes, rf"{layer}\.(\d+)\.attention\.self\.query\.weight")
    found = {"depth": len(own)} if own else {}
    found |= _read(
        shapes,
        encoder_width=("pre_bert_proj.weight", 1),
        hidden=(f"{layer}.0.intermediate.dense.bias", 0),
        positions=("speech_bert_adaptor.embeddings.position_embeddings.weight", 0),
    )
    longest = SpeechInterface.max_tokens  # more than there are positions cannot be read
    return found | {"max_tokens": min(longest, found.get("positions", longest))}


def _numbers(names: Iterable[str], pattern: str) -> list[int]:
    return sorted(int(match[1]) for name in names if (match := re.fullmatch(pattern, name)))


def _read(shapes: dict[str, tuple[int, ...]], **where: tuple[str, int]) -> dict[str, int]:
    """{field: axis length} of those (name, axis) that the file has."""
    return {
        field: shapes[name][axis]
        for field, (name, axis) in where.items()
        if len(shapes.get(name, ())) > axis
    }
