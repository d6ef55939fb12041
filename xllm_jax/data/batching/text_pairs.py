"""The sentences form: two texts that belong together, for the Q-Former's and C-Former's BERT.

The first text is the prefix, the second is what is to be written after it; joined, both are read
with some of their pieces hidden. The first text of a record is its written media (or its
instruction), the second its answer, with the question before it where there is one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from xllm_jax.core.stage import Data
from xllm_jax.data.batching.image_text_pairs import Plan
from xllm_jax.data.media import modalities
from xllm_jax.data.record import MEDIA, Mode, Record, Skipped
from xllm_jax.data.text import blip_captions
from xllm_jax.data.text.prompt import WRITTEN
from xllm_jax.data.text.wordpiece import WordPiece

HIDDEN_SHARE = 0.15  # of the joined pieces, as in BERT (arXiv 1810.04805, section 3.1)
MASK = "[MASK]"


@dataclasses.dataclass(frozen=True)
class Pair:
    """One row: a record and its two texts."""

    record: Record
    first: str
    second: str


def tools(data: Data) -> WordPiece:
    """Loads the WordPiece vocabulary that the data names."""
    return WordPiece(data.vocabulary)


def plan(records: Sequence[Record], kit: WordPiece, data: Data, mode: Mode) -> Plan:
    """One row per record, in order."""
    rows: list[Pair | None] = []
    skipped: list[Skipped] = []
    for record in records:
        example = record.example
        written = [words for kind, words in example.media if kind.startswith(WRITTEN)]
        first = "".join(written) or example.instruction
        second = (example.instruction if written else "") + example.answer
        if first and second:
            rows.append(Pair(record, blip_captions.caption(first), blip_captions.caption(second)))
        else:
            skipped.append(Skipped(example.key, "has no two texts", bad=True))
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
    """Tokenises one host's rows; nothing is opened, so `load` stays unused.

    Returns:
      ({'first', 'second': `[B, L]` int32 as [CLS] … [SEP] [PAD]*; 'first_mask', 'second_mask';
      'joined' `[B, 2L]` int32, the first and then the second without its [CLS], pieces hidden;
      'joined_mask'; 'targets' `[B, 2L]` int32; 'hidden' `[B, 2L]` float32, 1 where a piece was
      hidden}, nothing skipped).
    """
    mine = list(made.rows[rows])
    length = data.text_length
    first, first_mask = kit.rows([row.first if row else "" for row in mine], length)
    second, second_mask = kit.rows([row.second if row else "" for row in mine], length)
    targets = np.full((len(mine), 2 * length), kit.pad, np.int32)
    joined_mask = np.zeros((len(mine), 2 * length), bool)
    hidden = np.zeros((len(mine), 2 * length), np.float32)
    for number, row in enumerate(mine):
        if row is None:
            first_mask[number] = second_mask[number] = False
            continue
        pieces = [*first[number, first_mask[number]], *second[number, second_mask[number]][1:]]
        targets[number, : len(pieces)] = pieces
        joined_mask[number, : len(pieces)] = True
        chosen = row.record.generator(MEDIA).random(len(pieces)) < HIDDEN_SHARE
        special = np.isin(pieces, [kit.begin, kit.end])
        hidden[number, : len(pieces)] = chosen & ~special
    joined = np.where(hidden > 0, kit.encode_special(MASK), targets).astype(np.int32)
    return {
        "first": first,
        "first_mask": first_mask,
        "second": second,
        "second_mask": second_mask,
        "joined": joined,
        "joined_mask": joined_mask,
        "targets": targets,
        "hidden": hidden,
    }, []


def padding(batch: dict[str, np.ndarray]) -> dict[str, tuple[int, int]]:
    """{what: (used, room)} of a batch: word pieces."""
    return {"word pieces": (int(batch["joined_mask"].sum()), batch["joined_mask"].size)}
