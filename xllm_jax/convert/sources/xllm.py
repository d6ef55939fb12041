"""The X-LLM repository's own checkpoints (image, video, speech, merged, stage 3) to our interfaces.

Its runs save what trained, so that a file may hold a part in whole or in pieces: an image run the
whole image interface; a video run queries and adapters alone; a speech run C-Former and adapter;
the third stage the adapters and queries. Its `process_checkpoint.py` merges files by name; image
and video then share one Q-Former, which we store twice. The CIF module is in none of them.

Behind the speech adapter the repository has a ReLU that the paper has not: its speech checkpoints
need `adapter_relu` of `SpeechInterface`.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from xllm_jax.convert import ConversionPlan, Drop, Row, base_sizes, mount, sizes
from xllm_jax.convert.base_sizes import Base
from xllm_jax.convert.files import Checkpoint, Derived, View
from xllm_jax.convert.sources import blip2, cif_asr, xllm_sizes
from xllm_jax.convert.sources.bert import linear
from xllm_jax.core.errors import UserError
from xllm_jax.models.interfaces import QFormerInterface
from xllm_jax.models.speech_interface import SpeechInterface

IMAGE, VIDEO, SPEECH = "image_interface", "video_interface", "speech_interface"
# What shows that a file holds (a piece of) the part. Speech runs save the image's unused queries
# and norm as well, which say nothing.
MARKS = {
    IMAGE: r"opt_proj\..*",
    VIDEO: r"video_(proj\..*|query_tokens)",
    SPEECH: r"(speech_bert_adaptor|pre_bert_proj|post_bert_proj)\..*",
}
# A file holds each of these as a whole or not at all: {name: how our paths start}.
Q_FORMER = {"adapter": ("queries", "adapter/"), "norm": ("norm/",), "qformer": ("qformer/",)}
C_FORMER = {name: (f"{name}/",) for name in ("c_former/project", "c_former/bert", "adapter")}
PIECES = {IMAGE: Q_FORMER, VIDEO: Q_FORMER, SPEECH: C_FORMER}

DROP = (
    Drop(r".*position_ids", "the numbers 0, 1, 2 …"),
    Drop(r"visual_encoder\..*", "the vision encoder has a table of its own"),
    Drop(r"opt_model\..*", "the LLM has a table of its own"),
    Drop(r"speech_bert_adaptor\.pooler\..*", "the pooled vector is not used"),
    Drop(r"speech_bert_adaptor\.embeddings\.word_embeddings\.weight", "it reads embeddings"),
)
UNUSED = Drop(r"query_tokens|ln_vision\..*", "a speech run saves it, and does not use it")
FC = "speech_feat_proj.weight"


def recognize(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint holds an adapter under X-LLM's names."""
    return any(re.fullmatch(mark, name) for mark in MARKS.values() for name in checkpoint)


def options(checkpoint: Checkpoint | None, size: str) -> dict[str, Any]:
    """Which pieces of which parts the file holds, and their sizes.

    Args:
      checkpoint: the file; None exports all three interfaces as one merged file.
      size: a row of the network's SIZES; '' reads the sizes off the file.

    Returns:
      pieces: {part: names of PIECES}; sizes: {part: fields of its network}.

    Raises:
      UserError: an unknown size; a file that holds no part, or a speech adapter of the kind 'fc'.
    """
    if checkpoint is None:
        pieces = {part: list(names) for part, names in PIECES.items()}
        return {"pieces": pieces, "sizes": {part: xllm_sizes.named(part, size) for part in pieces}}
    if FC in checkpoint:
        raise UserError(
            "a speech adapter of the kind 'fc', without a C-Former, is not supported",
            field=checkpoint.where(FC),
            hint="Give a run with speech_adaptor_type: bert",
        )
    pieces = {part: _held(part, checkpoint) for part in PIECES if _marked(part, checkpoint)}
    if not pieces:
        raise UserError(
            "the file holds no adapter of X-LLM",
            field=str(checkpoint.path),
            hint="Give an image, video, speech or merged checkpoint of its runs",
        )
    fields = {part: xllm_sizes.read(part, checkpoint, size) for part in pieces}
    return {"pieces": pieces, "sizes": fields}


def options_of(base: Base) -> dict[str, Any]:
    """Pieces that a base holds, and their sizes.

    Raises:
      UserError: it holds none.
    """
    pieces = {
        part: [name for name, starts in names.items() if _starts_with(base, part, starts)]
        for part, names in PIECES.items()
    }
    pieces = {part: names for part, names in pieces.items() if names}
    if not pieces:
        base.axis(f"{IMAGE}/adapter/kernel", 0)
    whole = {IMAGE: base_sizes.interface, VIDEO: base_sizes.interface}
    whole |= {SPEECH: base_sizes.speech_interface}
    needs = {IMAGE: "qformer", VIDEO: "qformer", SPEECH: "c_former/bert"}
    fields = {
        part: xllm_sizes.named(part, "")
        | (whole[part](base, part) if needs[part] in names else base_sizes.ends(base, part))
        for part, names in pieces.items()
    }
    if SPEECH in fields:  # no more tokens than positions
        longest = SpeechInterface.max_tokens
        fields[SPEECH]["max_tokens"] = min(longest, fields[SPEECH].get("positions", longest))
    return {"pieces": pieces, "sizes": fields}


def _starts_with(base: Base, part: str, starts: tuple[str, ...]) -> bool:
    whole = tuple(f"{part}/{start}" for start in starts)
    return any(path.startswith(whole) for path in base.shapes)


def plan(options: Mapping[str, Any]) -> ConversionPlan:
    """The parts that a file holds pieces of; what it lacks of them is fresh."""
    table, shapes, fresh = [], {}, []
    for part, pieces in options["pieces"].items():
        model = _model(part, options["sizes"][part])
        shapes[part] = sizes.shapes_of(model)
        rows = _rows(part, model)
        held = _starts(part, pieces)
        table += mount(part, [row for row in rows if row.target.startswith(held)])
        fresh += [
            re.escape(f"{part}/{row.target}") for row in rows if not row.target.startswith(held)
        ]
        fresh += [f"{part}/cif/.*"] if part == SPEECH else []
    shared = _shared(options)
    table = [_rename(row, shared) for row in table]
    drop = DROP if IMAGE in options["pieces"] else (*DROP, UNUSED)
    return ConversionPlan(table=tuple(table), shapes=shapes, drop=drop, fresh=tuple(fresh))


def prepare(checkpoint: Checkpoint, options: Mapping[str, Any]) -> Mapping:
    """The checkpoint, with two names for each tensor that image and video interface share."""
    derived = {}
    for name in _shared(options) & checkpoint.keys():
        header = checkpoint.header(name)
        for part in (IMAGE, VIDEO):
            derived[f"{part}: {name}"] = Derived((name,), header.shape, header.dtype, _same)
    return View(checkpoint, derived) if derived else checkpoint


def restore(tensors: Mapping[str, np.ndarray], options: Mapping[str, Any]) -> Mapping:
    """Exported tensors under the repository's names; the inverse of `prepare`.

    Returns:
      the tensors; reading one that image and video interface share there raises UserError where
      they differ.
    """
    derived = {}
    for name in _shared(options):
        pair = tuple(f"{part}: {name}" for part in (IMAGE, VIDEO))
        header = getattr(tensors, "header", tensors.__getitem__)(pair[0])  # an array has both, too
        make = functools.partial(_merge, name)
        derived[name] = Derived(pair, header.shape, header.dtype, make)
    return View(tensors, derived) if derived else tensors


def _merge(name: str, image: np.ndarray, video: np.ndarray) -> np.ndarray:
    if image.tobytes() != video.tobytes():
        raise UserError(
            "differs between the image and the video interface, which share it in X-LLM",
            field=name,
            hint="Such interfaces cannot stand in one file of X-LLM's",
        )
    return image


def _same(tensor: np.ndarray) -> np.ndarray:
    return tensor


def _marked(part: str, names: Iterable[str]) -> bool:
    return any(re.fullmatch(MARKS[part], name) for name in names)


def _held(part: str, checkpoint: Checkpoint) -> list[str]:
    """Pieces of a part that the file holds, told by any of their tensors."""
    rows = _rows(part, _model(part, xllm_sizes.named(part, "real")))
    return [
        piece
        for piece, starts in PIECES[part].items()
        if any(
            name in checkpoint for r in rows if r.target.startswith(starts) for name in r.names()
        )
    ]


def _starts(part: str, pieces: Iterable[str]) -> tuple[str, ...]:
    return tuple(start for piece in pieces for start in PIECES[part][piece])


def _model(part: str, fields: Mapping[str, int]) -> SpeechInterface | QFormerInterface:
    return (SpeechInterface if part == SPEECH else QFormerInterface)(**fields)


def _rows(part: str, model: Any) -> tuple[Row, ...]:
    """Rows of a whole part; targets without the part's name."""
    if part == SPEECH:
        return cif_asr.interface_rows(model.depth, model.heads)
    frequency = model.cross_attention_frequency
    rows = blip2.rows(model.depth, model.heads, frequency, "lavis", text=False)
    if part == IMAGE:
        return (*rows, *linear("opt_proj", "adapter"))
    own = {"queries": "video_query_tokens"}
    rows = tuple(dataclasses.replace(r, source=own.get(r.target, r.source)) for r in rows)
    return (*rows, *linear("video_proj", "adapter"))


def _shared(options: Mapping[str, Any]) -> set[str]:
    """Names of the tensors that fill both the image and the video interface."""
    pieces = options["pieces"]
    common = set(pieces.get(IMAGE, ())) & set(pieces.get(VIDEO, ())) - {"adapter"}
    if not common:
        return set()
    rows = _rows(IMAGE, _model(IMAGE, options["sizes"][IMAGE]))
    starts = _starts(IMAGE, common)
    return {name for row in rows if row.target.startswith(starts) for name in row.names()}


def _rename(row: Row, shared: set[str]) -> Row:
    """The row under the part's own name for a shared tensor, see `prepare`."""
    if not shared.intersection(row.names()):
        return row
    return dataclasses.replace(row, source=f"{row.target.partition('/')[0]}: {row.source}")
