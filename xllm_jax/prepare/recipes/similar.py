"""Image-text pairs whose image and caption CLIP finds alike, as the paper filtered Wukong.

    OUTPUT/SPLIT_scores.npy                     `[records]` float32: the similarity of every record
                                                of the source, NaN where it cannot be read
    OUTPUT/selection.json, OUTPUT/SPLIT.npy     those that are kept, for the reader 'selection'
    OUTPUT/SPLIT_similar.json                   the counts

Scores come from a file, any model's: the paper filters by CLIP at 0.45, its repository by
Chinese-CLIP at 0.475. Nothing is copied: train on OUTPUT with the reader 'selection', or prepare
shards of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Source
from xllm_jax.data import stream
from xllm_jax.data.lazy import Lines, Rows
from xllm_jax.data.sources import layout
from xllm_jax.prepare import pick, plan, transforms


def build(
    input: str,
    output: str,
    reader: str,
    scores: str,
    split: str = "train",
    options: dict[str, Any] | None = None,
    threshold: float = transforms.THRESHOLD,
) -> dict[str, Any]:
    """Keeps the pairs of one split that are alike enough.

    Args:
      input: where the source lies.
      output: folder of the list.
      reader: of the source.
      split: of the source.
      options: of the reader.
      scores: file of similarities: .npy `[records]` in the reader's order; .jsonl of
        {"key", "similarity"}; or .tsv (.txt) of key, tab, similarity.
      threshold: least similarity that is kept: the paper's 0.45 by default.

    Returns:
      {'records', 'kept', 'unknown' (without a score), 'threshold'}.

    Raises:
      UserError: no such file, nothing that is kept.
    """
    source = Source(reader, input, split, options or {})
    known = read(scores, stream.read(reader, source, ""))
    kept = np.flatnonzero(known >= np.float32(threshold))  # NaN is not
    if not len(kept):
        best = "no scores" if np.isnan(known).all() else f"the most is {np.nanmax(known):.3f}"
        raise UserError(f"keeps nothing ({best})", field="--threshold", mend="Lower it")
    Path(output).mkdir(parents=True, exist_ok=True)
    pick.save(Path(output) / f"{split}_scores.npy", known)
    rows = np.stack([np.zeros_like(kept), kept, np.full_like(kept, -1)], axis=1)
    pick.write(output, split, {reader: source}, rows)
    counts = {
        "records": len(known),
        "kept": len(kept),
        "unknown": int(np.isnan(known).sum()),
        "threshold": threshold,
    }
    plan.write(Path(output) / f"{split}_similar.json", counts)
    return counts


def read(scores: str, found: Sequence[Any]) -> np.ndarray:
    """Similarities of a source's records: `[records]` float32, NaN where the file has none.

    Raises:
      UserError: no such file, another number of records, a line of another form.
    """
    if scores.endswith(".npy"):
        known = _array(scores)
        if known.shape != (len(found),):
            what = f"has the shape {known.shape} for {len(found)} records"
            raise UserError(what, field=scores, mend="One number for each record, in order")
        return known.astype(np.float32)
    table = _by_key(scores)
    known = (table.get(_key(found, place), np.nan) for place in range(len(found)))
    return np.fromiter(known, np.float32, len(found))


def _array(scores: str) -> np.ndarray:
    try:
        return np.load(scores, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot be read as numbers ({error})", field=scores) from None


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


def _key(found: Sequence[Any], place: int) -> str:
    try:
        return found[place].key
    except UserError:
        return ""
