"""Image-text pairs whose image and caption CLIP finds alike, as the paper filtered Wukong.

    OUTPUT/scores/                              with `clip`: what it has computed so far
    OUTPUT/SPLIT_scores.npy                     `[records]` float32: the similarity of every record
                                                of the source, NaN where it cannot be read
    OUTPUT/selection.json, OUTPUT/SPLIT.npy     those that are kept, for the reader 'selection'
    OUTPUT/SPLIT_similar.json                   the counts

Scores are cosines that a CLIP of ours computes, or come from a file, any model's: the paper filters
by CLIP at 0.45, its repository by Chinese-CLIP at 0.475. In OpenAI's models, cosines of pairs that
fit lie about 0.25 to 0.35, so that the paper's number presumably is of another scale; no score is
rescaled here. Nothing is copied: train on OUTPUT with the reader 'selection', or prepare shards of
it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xllm_jax.core import atomic
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Source
from xllm_jax.data import mixture
from xllm_jax.data.example import Example
from xllm_jax.data.rows import files
from xllm_jax.data.rows.lazy import Lines, Rows
from xllm_jax.data.sources import layout
from xllm_jax.prepare import pick, runner

THRESHOLD = 0.45  # the paper's, of image and caption by CLIP
CHUNK = 1 << 16  # records that a worker of Beam looks at together


def build(
    input: str,
    output: str,
    reader: str,
    scores: str = "",
    split: str = "train",
    options: dict[str, Any] | None = None,
    threshold: float = THRESHOLD,
    clip: str = "",
    tokenizer: str = "",
    batch: int = 256,
    beam: Sequence[str] = (),
    workers: int = 0,
    allow_paths: Sequence[str] = (),
) -> dict[str, Any]:
    """Keeps the pairs of one split that are alike enough.

    Args:
      input: where the source lies.
      output: folder of the list.
      reader: of the source.
      scores: file of similarities: .npy `[records]` in the reader's order; .jsonl of
        {"key", "similarity"}; or .tsv (.txt) of key, tab, similarity.
      split: of the source.
      options: of the reader.
      threshold: least similarity that is kept: the paper's 0.45 by default.
      clip: instead of `scores`, a base of CLIP that computes them.
      tokenizer: folder of CLIP's tokenizer, where the base has none.
      batch: pairs that CLIP looks at together.
      beam, workers: as of `runner.mapped`.
      allow_paths: folders that the source's files may lie in, too.

    Returns:
      {'records', 'kept', 'unknown' (without a score), 'threshold'}, and with `clip` 'reasons', {why
      there is none: count}.

    Raises:
      UserError: no scores or two kinds of them, no such file, nothing that is kept.
    """
    if bool(scores) == bool(clip):
        what = "one of --scores and --clip is needed" + (", not both" if clip else "")
        raise UserError(what, field="--scores", hint="--clip=bases/clip computes scores")
    source, about = Source(reader, input, split, options or {}, tuple(allow_paths)), {}
    if clip:
        known, about = computed(source, output, clip, tokenizer, batch)
    else:
        known = read(scores, mixture.read(reader, source, ""))
    file = Path(output) / f"{split}_scores.npy"
    atomic.write_array(file, known)
    kept = alike(file, threshold, beam, workers)
    unknown = int(np.isnan(known).sum())
    counts = {"records": len(known), "kept": len(kept), "unknown": unknown, "threshold": threshold}
    write(output, source, kept, counts | about)
    atomic.remove_partial(Path(output))
    return counts | about


def computed(
    source: Source, output: str, clip: str, tokenizer: str, batch: int
) -> tuple[np.ndarray, dict[str, Any]]:
    """(cosines `[records]` float32, {'reasons': …}); arguments and counts as of `build`."""
    from xllm_jax.prepare import score  # with all networks, which scores of a file do not need

    known, reasons = score.run(source, f"{output}/scores", score.Scorer(clip, tokenizer), batch)
    return known, {"reasons": dict(reasons.most_common())}


def write(output: str, source: Source, kept: np.ndarray, counts: dict[str, Any]) -> None:
    """Writes the list of what is kept, and the counts."""
    rows = np.stack([np.zeros_like(kept), kept, np.full_like(kept, -1)], axis=1)
    pick.write(output, source.split, {source.reader: source}, rows)
    atomic.write_json(Path(output) / f"{source.split}_similar.json", counts)


def alike(file: Path, threshold: float, beam: Sequence[str] = (), workers: int = 0) -> np.ndarray:
    """Places of the scores in a file that are high enough: `[kept]` int64, ascending.

    Args:
      file: .npy `[records]` float32; NaN is never high enough.
      threshold: least score.
      beam, workers: as of `build`.

    Raises:
      UserError: none is.
    """
    known, listed = np.load(file, mmap_mode="r"), file.with_name(f"{file.stem}_kept.json")
    step, starts = Chunk(str(file), threshold), range(0, len(known), CHUNK)
    found = runner.mapped(step, starts, listed, beam, workers)
    kept = np.sort(np.asarray([place for places in found for place in places], np.int64))
    if not len(kept):
        best = "no scores" if np.isnan(known).all() else f"the most is {np.nanmax(known):.3f}"
        raise UserError(f"keeps nothing ({best})", field="--threshold", hint="Lower it")
    return kept


class Chunk:
    """Keeps places of some scores of a file."""

    def __init__(self, file: str, threshold: float):
        self._file, self._least = file, np.float32(threshold)

    def __call__(self, start: int) -> list[int]:
        """Places of the scores from one place on that are high enough."""
        known = np.load(self._file, mmap_mode="r")[start : start + CHUNK]
        return (start + np.flatnonzero(known >= self._least)).tolist()


def read(scores: str, found: Sequence[Example]) -> np.ndarray:
    """Similarities of a source's records: `[records]` float32, NaN where the file has none.

    Raises:
      UserError: no such file, another number of records, a line of another form.
    """
    if scores.endswith(".npy"):
        known = files.array(scores, "array of numbers")
        if known.shape != (len(found),):
            what = f"has the shape {known.shape} for {len(found)} records"
            raise UserError(what, field=scores, hint="One number for each record, in order")
        return known.astype(np.float32)
    table = _by_key(scores)
    known = (table.get(_key(found, place), np.nan) for place in range(len(found)))
    return np.fromiter(known, np.float32, len(found))


def _by_key(scores: str) -> dict[str, float]:
    lined = scores.endswith(".jsonl")
    rows = Rows(scores) if lined else Lines(scores)
    table = {}
    for place in range(len(rows)):
        row, where = rows[place], rows.place(place)
        if lined:
            key = str(layout.get(row, "key", (str, int), where))
            value = layout.get(row, "similarity", (int, float), where)
        else:
            key, _, value = row.rpartition("\t")
        try:
            table[key] = float(value)
        except ValueError:
            raise UserError(f"{value!r} is no similarity", field=where) from None
    return table


def _key(found: Sequence[Example], place: int) -> str:
    try:
        return found[place].key
    except UserError:
        return ""
