"""Held-out requests answered with pictures: what `xllm evaluate` does with --draw."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xllm_jax.core import atomic
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Stage
from xllm_jax.data import mixture
from xllm_jax.data.example import Example
from xllm_jax.data.record import Record
from xllm_jax.evaluation.suites import pictures
from xllm_jax.inference import assistant, decoder_base
from xllm_jax.inference.decoder_base import DecoderBase
from xllm_jax.inference.load_run import load_run, stage_of
from xllm_jax.launch import drawing

LIMIT = 64  # requests of a run, where nobody says
MOST_TOKENS = 256  # of an answer
RECORD, WANTED = "pictures.json", "wanted"


def runs_in(folder: Path) -> list[Path]:
    """The finished runs below a folder whose answers hold pictures.

    Raises:
      UserError: there is none.
    """
    found = [path.parent for path in sorted(folder.glob("*/final")) if path.is_dir()]
    found = [run for run in found if stage_of(run).outputs]
    if not found:
        hint = "Train one with --config=stage_output_image, or leave --draw out"
        raise UserError(
            f"no finished run in {folder} answers with pictures", field="--draw", hint=hint
        )
    return found


def requests(stage: Stage, limit: int) -> list[Example]:
    """Held-out requests of a stage that ask for pictures, spread over its validation sources.

    Args:
      stage: with the data of its run, paths resolved.
      limit: how many at most.

    Raises:
      UserError: the stage names no such sources, or none of their records asks for a picture.
    """
    held = stage.validation
    if not held.sources:
        what = "names no held-out requests, and --draw asks them"
        hint = "Train with validation sources, as stage_output_image:tiny has them"
        raise UserError(what, field="validation.sources", hint=hint)
    data = dataclasses.replace(stage.data, sources=held.sources, mix=held.mix)
    weights = mixture.mixture(data)
    sources = {name: mixture.of_stage(name, data) for name in weights}
    drawn = mixture.sample(sources, weights, limit)
    asked = [one.example for one in drawn if isinstance(one, Record) and one.example.outputs]
    if not asked:
        what = "none of its records asks for a picture"
        raise UserError(what, field="validation.sources", hint="Name requests to draw")
    return asked[:limit]


def evaluate(run: Path, folder: Path, limit: int, rows: int, seed: int = 0) -> dict[str, Any]:
    """Answers a run's held-out requests, writes their pictures and counts.

    The picture of a sample KEY is KEY.png, what was drawn from KEY.npz, and what the decoder's own
    text encoder says of the caption wanted/KEY.npz: what the suite `pictures` reads.

    Args:
      run: its folder.
      folder: where pictures go, below the run's name.
      limit: requests at most; 0 takes `LIMIT`.
      rows: requests answered at a time.
      seed: of the noise that every picture begins with.

    Returns:
      JSON: `requests`, `asked` and `drawn` pictures, `as_asked` (share of answers that hold as
      many of each modality as were asked for), `answers` ({key, request, caption, text} of each).

    Raises:
      UserError: see `requests` and `drawing.writer`.
    """
    stage, place = stage_of(run), folder / run.name
    write = drawing.writer(stage, str(place), seed)
    asked = requests(stage, limit or LIMIT)
    most = min(stage.data.answers, MOST_TOKENS)
    model = assistant.Assistant(load_run(run), rows, most)
    replies = model.replies([dataclasses.replace(one, answer="") for one in asked])
    easel = drawing.Easel(place, model.family, write)
    names = [pictures.file_of("", one.key, "").name for one in asked]
    texts = [easel.text(reply, name) for reply, name in zip(replies, names)]
    for reply, name in zip(replies, names):
        for first in reply.pictures[:1]:
            drawing.embeddings(first, place / name)
    for modality in stage.outputs:
        base = decoder_base.of_stage(stage, modality)
        if base:
            write_wanted(base, modality, asked, place / WANTED, rows)
    kinds = [Counter(piece.modality for piece in reply.pictures) for reply in replies]
    wanted = [Counter(modality for modality, _ in one.outputs) for one in asked]
    found = {
        "requests": len(asked),
        "asked": sum(map(Counter.total, wanted)),
        "drawn": sum(map(Counter.total, kinds)),
        "as_asked": sum(a == b for a, b in zip(kinds, wanted)) / len(asked),
        "answers": [_answer(*pair) for pair in zip(asked, texts)],
    }
    atomic.write_json(place / RECORD, found)
    return found


def write_wanted(
    base: DecoderBase, modality: str, asked: Sequence[Example], folder: Path, rows: int
) -> None:
    """Writes what a decoder's text encoder says of the captions, a file KEY.npz each.

    Args:
      base: of the decoder.
      modality: that it draws; of several captions in it, the first counts.
      asked: the requests.
      folder: of the files.
      rows: captions read at a time.
    """
    said = [(e.key, c) for e in asked for kind, c in e.outputs[:1] if kind == modality]
    for start in range(0, len(said), rows):
        some = said[start : start + rows]
        captions = [caption for _, caption in some]
        captions += [""] * (rows - len(some))  # one program for all
        for (key, _), values in zip(some, base.conditions(captions)):
            drawing.prompt_embeds(values, pictures.file_of(str(folder), key, ""))


def _answer(example: Example, text: str) -> dict[str, str]:
    caption = "; ".join(said for _, said in example.outputs)
    return {
        "key": example.key,
        "request": example.instruction,
        "caption": caption,
        "text": text,
    }


def table(found: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """One line a run."""
    head = ("run", "requests", "pictures asked", "drawn", "answers as asked")
    rows = [
        (name, str(one["requests"]), str(one["asked"]), str(one["drawn"]), f"{one['as_asked']:.1%}")
        for name, one in found
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
        for row in (head, *rows)
    )
