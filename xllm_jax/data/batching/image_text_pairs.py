"""The pairs form: images and captions for stage 1 of the Q-Former (ITC, ITM, ITG)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Data
from xllm_jax.data.media import modalities
from xllm_jax.data.record import Mode, Record, Skipped
from xllm_jax.data.text import blip_captions
from xllm_jax.data.text.wordpiece import WordPiece

IMAGE = "image"


@dataclasses.dataclass(frozen=True)
class Pair:
    """One row: a record, its image and its caption."""

    record: Record
    path: str
    caption: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """Rows of a global batch; None is padding."""

    rows: tuple[Pair | None, ...]
    skipped: tuple[Skipped, ...] = ()
    cut: int = 0

    def supervised(self) -> int:
        """Captions of the plan."""
        return sum(row is not None for row in self.rows)

    def members(self, rows: slice) -> list[tuple[int, int, Record]]:
        """(row, 1, record) of every pair in some rows, rows counted from the first."""
        return [(number, 1, row.record) for number, row in enumerate(self.rows[rows]) if row]


def tools(data: Data) -> WordPiece:
    """Loads the WordPiece vocabulary that the data names."""
    return WordPiece(data.vocabulary)


def plan(records: Sequence[Record], kit: WordPiece, data: Data, mode: Mode) -> Plan:
    """One row per record, in order."""
    rows: list[Pair | None] = []
    skipped: list[Skipped] = []
    for record in records:
        example = record.example
        paths = [path for modality, path in example.media if modality == IMAGE]
        caption = example.answer or next(iter(example.references), "")
        caption = blip_captions.caption(caption)
        if len(paths) == 1 and caption:
            rows.append(Pair(record, paths[0], caption))
        else:
            reason = f"has {len(paths)} images and {'a' if caption else 'no'} caption"
            skipped.append(Skipped(example.key, reason, bad=True))
    rows += [None] * (data.examples - len(rows))
    return Plan(tuple(rows), tuple(skipped))


def batches(records: Sequence[Record], kit: WordPiece, data: Data, mode: Mode) -> list[Plan]:
    """Plans that hold every record exactly once, in order; the last is padded."""
    starts = range(0, len(records), data.examples)
    return [plan(records[start : start + data.examples], kit, data, mode) for start in starts]


def fill(
    made: Plan,
    rows: slice,
    kit: WordPiece,
    data: Data,
    mode: Mode,
    load: modalities.Load = modalities.load,
) -> tuple[dict[str, np.ndarray], list[Skipped]]:
    """Opens the images of one host's rows.

    Returns:
      ({'images': `[B, H, W, 3]` float32, 'ids': `[B, L]` int32 as [CLS] … [SEP] [PAD]*, 'mask':
      `[B, L]` bool, 'weights': `[B]` float32, 0 for a row without a pair, which is a gray image
      and an empty caption}, the records that could not be read).
    """
    mine = list(made.rows[rows])
    images = np.zeros((len(mine), *modalities.find(IMAGE, data).shape(data)), np.float32)
    skipped: list[Skipped] = []
    for number, row in enumerate(mine):
        if row is None:
            continue
        try:
            values, _ = load(IMAGE, row.path, data, row.record, 0, mode.train)
            images[number] = values[0]
        except UserError as error:
            mine[number] = None
            skipped.append(Skipped(row.record.example.key, error.what, True, error.field))
    ids, mask = kit.rows([row.caption if row else "" for row in mine], data.text_length)
    weights = np.asarray([row is not None for row in mine], np.float32)
    return {"images": images, "ids": ids, "mask": mask, "weights": weights}, skipped


def padding(batch: dict[str, np.ndarray]) -> dict[str, tuple[int, int]]:
    """{what: (used, room)} of a batch: images and word pieces."""
    return {
        IMAGE: (int(batch["weights"].sum()), len(batch["weights"])),
        "word pieces": (int(batch["mask"][batch["weights"] > 0].sum()), batch["mask"].size),
    }
