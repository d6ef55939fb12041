"""How alike CLIP finds the image and the caption of every record: computed here, on all devices.

    OUTPUT/clip.SPLIT.json              which CLIP and tokenizer the scores are of
    OUTPUT/SPLIT.plan.json              of which source
    OUTPUT/shards/SPLIT-00000.json      {'similarities': [number or null, …], 'rejects': [{'key',
                                        'file', 'reason'}, …]} of some records, whole or not at all

Images are decoded in threads while the devices compute. Products are of full float32 everywhere, so
that a run that is continued on another kind of chip goes on with the same scores.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from xllm_jax.core import atomic, disk, mesh, sharded_job
from xllm_jax.core.errors import UserError
from xllm_jax.core.parallel import overlapped
from xllm_jax.core.progress import Bar
from xllm_jax.core.sharded_job import Shards
from xllm_jax.core.stage import Data, Source
from xllm_jax.data import guarded
from xllm_jax.data.example import Example
from xllm_jax.data.media import image, preprocessing
from xllm_jax.data.media.decode_workers import Decoders
from xllm_jax.evaluation.clip_base import ClipBase
from xllm_jax.prepare import preparation

PER_SHARD = 4096  # records: what an interruption costs at most
THREADS = 16
CORES = os.cpu_count() or 1  # each with a process that decodes

Square = Callable[[str], np.ndarray]
Pair = tuple[np.ndarray, str]  # values `[side, side, 3]`, caption


class Scorer(ClipBase):
    """CLIP's cosines of pairs."""

    def __call__(self, values: np.ndarray, captions: Sequence[str]) -> jax.Array:
        """Starts computing cosines `[pairs]` float32; the devices divide their number.

        Args:
          values: `[pairs, side, side, 3]` float32, normalized.
          captions: of them.
        """
        return self._compute("__call__", values, self._ids(captions))


def run(source: Source, output: str, scorer: Scorer, batch: int) -> tuple[np.ndarray, Counter[str]]:
    """Scores every record of a source; what is done already is not done again.

    Args:
      source: of pairs.
      output: folder of the scores.
      scorer: of a pair.
      batch: pairs computed at a time.

    Returns:
      (`[records]` float32, NaN where there is none; {why there is none: count}).

    Raises:
      UserError: nothing to read, or the folder holds scores of another source, CLIP or tokenizer,
        or unfinished ones whose pixels another library made.
    """
    plan = preparation.make(source.reader, source, output, PER_SHARD, check=False)
    file, hint = (
        Path(output) / f"clip.{source.split}.json",
        "Choose another --output, or remove them",
    )
    another = "scores of another CLIP or tokenizer"
    media = preprocessing.of_modality(image.MODALITY, Data())
    held = (sharded_job.known(file) or {}).get("media", {})
    sharded_job.begin(file, scorer.identity, {"media": media}, lambda found: another, hint)
    shards = Shards(Path(output), source.split, plan.records, plan.per_shard)
    todo = shards.todo()
    if todo:
        preprocessing.compare(held, media, "when scoring began", "same", hint)
        limits = Data(deadline=plan.deadline, memory=plan.memory, threads=min(THREADS, CORES))
        with contextlib.closing(Decoders(limits)) as decoders:
            square = functools.partial(decoders.square, side=scorer.side)
            read = functools.partial(_read, plan.examples(), square, plan.name)
            _write(shards, todo, read, scorer, batch)
    shards.remove_partial()
    notes = shards.notes()
    known = np.concatenate([np.asarray(note["similarities"], np.float32) for note in notes])
    return known, Counter(one["reason"] for note in notes for one in note["rejects"])


def pair(example: Example, square: Square) -> Pair:
    """The image of a record as CLIP sees it, `[side, side, 3]` float32, and its caption.

    Args:
      example: the record.
      square: from a path to such an image.

    Raises:
      UserError: not one image and one caption, or the image cannot be read.
    """
    example = guarded.checked(example)
    paths = [path for modality, path in example.media if modality == "image"]
    if len(paths) != 1 or not example.answer.strip():
        what = f"is no pair ({len(paths)} images, {len(example.answer)} letters of a caption)"
        raise UserError(what, field=example.key)
    try:
        return square(paths[0]), example.answer
    except UserError:
        raise
    except Exception as error:  # what foreign decoders raise on damaged files has no bounds
        what = f"its decoder failed ({type(error).__name__}: {error})"
        raise UserError(what, field=paths[0]) from error


def _write(
    shards: Shards,
    todo: Sequence[int],
    read: Callable[[int], Pair | dict[str, str]],
    scorer: Scorer,
    batch: int,
) -> None:
    batch = mesh.rounded_up(batch)
    done = shards.total - shards.rows_in(todo)
    disk.make_folder(shards.note(0).parent)
    with Bar(total=shards.total, initial=done, desc="CLIP", unit="pairs") as bar:
        for shard, decoded in shards.read(todo, read, THREADS, 2 * batch):
            found = list(_scores(decoded, scorer, batch, bar))
            scores = [None if isinstance(one, dict) else one for one in found]
            rejects = [one for one in found if isinstance(one, dict)]
            atomic.write_json(shards.note(shard), {"similarities": scores, "rejects": rejects})


def _read(found: Sequence[Example], square: Square, name: str, place: int) -> Pair | dict[str, str]:
    """A pair, or {'key', 'file', 'reason'} of what is none."""
    try:
        return pair(found[place], square)
    except UserError as error:
        return preparation.rejected(name, place, error)


def _scores(
    decoded: Iterable[Pair | dict[str, str]], scorer: Scorer, batch: int, bar: Bar
) -> Iterator[float | dict[str, str]]:
    """Cosines in order, and rejects in their places."""

    def start(entries: list[Pair | dict[str, str]]) -> jax.Array:
        return scorer(*_stacked(entries, scorer.side, batch))

    for entries, made in overlapped(decoded, batch, start):
        rows = zip(entries, np.asarray(made))
        yield from (one if isinstance(one, dict) else float(score) for one, score in rows)
        bar.update(len(entries))


def _stacked(
    entries: Sequence[Pair | dict[str, str]], side: int, batch: int
) -> tuple[np.ndarray, list[str]]:
    """One batch; rows of rejects and behind the end are empty."""
    values, captions = np.zeros((batch, side, side, 3), np.float32), [""] * batch
    for row, entry in enumerate(entries):
        if not isinstance(entry, dict):
            values[row], captions[row] = entry
    return values, captions
