"""Spoken slots shrink to what was really said.

Before generation nobody knows how many tokens an utterance fires, so its slot has the largest size.
Once the interface has counted, the unused places go, and the LLM sees the same sequence as in
training. (The reference leaves them in, visible; not calling `settle` is that behavior.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from xllm_jax.core.batch import Batch


def settle(batch: Batch, counts: Mapping[str, np.ndarray], strides: Mapping[str, int]) -> Batch:
    """Takes unused places out of spoken slots; shapes stay, rows end in more padding.

    Args:
      batch: NumPy arrays, slots at their largest size.
      counts: {modality: `[B, M]` embeddings that each item really has}.
      strides: {modality: embeddings per item in the interface's output}, `Data.embeddings`.
    """
    gone = np.zeros(batch.ids.shape, bool)
    for modality, count in counts.items():
        index = batch.media[modality].index
        item, place = np.divmod(np.maximum(index, 0), strides[modality])
        gone |= (index >= 0) & (place >= np.take_along_axis(np.asarray(count), item, axis=1))
    order = np.argsort(gone, axis=1, kind="stable")
    kept = np.arange(gone.shape[1]) < (~gone).sum(axis=1, keepdims=True)
    before = _gone_before(gone, batch.segments)

    def move(values: np.ndarray, empty: int = 0) -> np.ndarray:
        return np.where(kept, np.take_along_axis(values, order, axis=1), empty).astype(values.dtype)

    first = move(batch.positions[..., 0] - before)
    shift = np.take_along_axis(np.cumsum(gone, axis=1), batch.answer_index, axis=1)
    return dataclasses.replace(
        batch,
        ids=move(batch.ids),
        positions=np.stack([first, move(batch.positions[..., 1])], axis=-1),
        segments=move(batch.segments),
        context=move(batch.context),
        answer_index=np.where(batch.weights > 0, batch.answer_index - shift, 0).astype(np.int32),
        media={
            name: dataclasses.replace(entry, index=move(entry.index, -1))
            for name, entry in batch.media.items()
        },
    )


def _gone_before(gone: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """`[B, T]` places taken out so far in each token's own segment."""
    counted = np.cumsum(gone, axis=1)
    starts = np.diff(segments, axis=1, prepend=0) != 0
    base = np.maximum.accumulate(np.where(starts, counted - gone, 0), axis=1)
    return counted - base
