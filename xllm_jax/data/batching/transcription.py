"""The transcription form: utterances and their characters, for stage 1 of the speech branch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Data
from xllm_jax.data.example import Example
from xllm_jax.data.media import modalities
from xllm_jax.data.record import DoesNotFit, Mode, Record, Skipped
from xllm_jax.data.text.characters import PAD, CharacterVocabulary

SPEECH = "speech"


@dataclasses.dataclass(frozen=True)
class Utterance:
    """One row: a record, its file and its character ids with the end token."""

    record: Record
    path: str
    tokens: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Rows of a global batch (None is padding), and the frames of its length bucket."""

    rows: tuple[Utterance | None, ...]
    frames: int
    skipped: tuple[Skipped, ...] = ()
    cut: int = 0

    def supervised(self) -> int:
        """Supervised characters of the plan."""
        return sum(len(row.tokens) for row in self.rows if row)

    def members(self, rows: slice) -> list[tuple[int, int, Record]]:
        """(row, 1, record) of every utterance in some rows, rows counted from the first."""
        mine = enumerate(self.rows[rows])
        return [(number, 1, row.record) for number, row in mine if row]


def tools(data: Data) -> CharacterVocabulary:
    """Loads the characters that the data names.

    Raises:
      UserError: no such file, or speech comes as what this form's model is to learn to make.
    """
    if modalities.featured(data):
        what = "recognition trains the speech encoder and CIF, so it needs sounds"
        raise UserError(what, field="data.speech_features", hint="Leave it out")
    return CharacterVocabulary.load(data.characters)


def bucket(example: Example, data: Data) -> int:
    """Length bucket of an utterance by its file's header; the last one where that tells nothing."""
    return modalities.bucket(example, data, len(data.frames) - 1)


def plan(records: Sequence[Record], kit: CharacterVocabulary, data: Data, mode: Mode) -> Plan:
    """One row per record, in order; the bucket is the longest that a record belongs to."""
    rows: list[Utterance | None] = []
    skipped: list[Skipped] = []
    for record in records:
        try:
            rows.append(_utterance(record, kit, data, mode))
        except DoesNotFit as error:
            skipped.append(Skipped(record.example.key, error.what))
        except UserError as error:
            skipped.append(Skipped(record.example.key, error.what, bad=True))
    bucket = max((row.record.bucket for row in rows if row), default=0)
    rows += [None] * (data.examples - len(rows))
    return Plan(tuple(rows), data.frames[bucket], tuple(skipped))


def _utterance(record: Record, kit: CharacterVocabulary, data: Data, mode: Mode) -> Utterance:
    """The row of one record.

    Raises:
      UserError: not one utterance, or no transcript.
      DoesNotFit: a transcript that is too long to be learnt.
    """
    example = record.example
    paths = [path for modality, path in example.media if modality == SPEECH]
    if len(paths) != 1:
        raise UserError(f"has {len(paths)} speech files, must have one", field=example.key)
    text = example.transcript or example.answer
    if not text.strip():
        raise UserError("has no transcript", field=example.key)
    tokens = kit.encode(text)
    if len(tokens) > data.characters_length and mode.train:
        raise DoesNotFit(
            f"its transcript has {len(tokens)} tokens, data.characters_length holds "
            f"{data.characters_length}",
            field=example.key,
        )
    # In evaluation the whole reference is compared; only the loss sees a cut one.
    return Utterance(record, paths[0], tuple(tokens[: data.characters_length]))


def batches(
    records: Sequence[Record], kit: CharacterVocabulary, data: Data, mode: Mode
) -> list[Plan]:
    """Plans that hold every record exactly once, in order; the last is padded."""
    starts = range(0, len(records), data.examples)
    return [plan(records[start : start + data.examples], kit, data, mode) for start in starts]


def fill(
    made: Plan,
    rows: slice,
    kit: CharacterVocabulary,
    data: Data,
    mode: Mode,
    load: modalities.Load = modalities.load,
) -> tuple[dict[str, np.ndarray], list[Skipped]]:
    """Opens the utterances of one host's rows.

    Returns:
      ({'features': `[B, U, F]` float32 with U = `made.frames`, 'lengths': `[B]` int32, 'tokens':
      `[B, S]` int32, 'token_lengths': `[B]` int32}, the records that could not be read). A row
      without an utterance has both lengths 0.
    """
    mine = made.rows[rows]
    shape = (made.frames, *modalities.find(SPEECH, data).shape(data)[1:])
    batch = {
        "features": np.zeros((len(mine), *shape), np.float32),
        "lengths": np.zeros(len(mine), np.int32),
        "tokens": np.full((len(mine), data.characters_length), PAD, np.int32),
        "token_lengths": np.zeros(len(mine), np.int32),
    }
    skipped: list[Skipped] = []
    for number, row in enumerate(mine):
        if row is None:
            continue
        try:
            values, lengths = load(SPEECH, row.path, data, row.record, 0, mode.train)
            length = _bounded(int(lengths[0]), made.frames, row.path)
        except DoesNotFit as error:
            if mode.strict:
                raise
            skipped.append(Skipped(row.record.example.key, error.what))
            continue
        except UserError as error:
            skipped.append(Skipped(row.record.example.key, error.what, True, error.field))
            continue
        batch["features"][number, :length] = values[0, :length]
        batch["lengths"][number] = length
        batch["tokens"][number, : len(row.tokens)] = row.tokens
        batch["token_lengths"][number] = len(row.tokens)
    return batch, skipped


def padding(batch: dict[str, np.ndarray]) -> dict[str, tuple[int, int]]:
    """{what: (used, room)} of a batch: filterbank frames and characters."""
    rows, frames = batch["features"].shape[:2]
    return {
        SPEECH: (int(batch["lengths"].sum()), rows * frames),
        "characters": (int(batch["token_lengths"].sum()), batch["tokens"].size),
    }


def _bounded(length: int, frames: int, path: str) -> int:
    if length > frames:
        raise DoesNotFit(
            f"has {length} frames, its bucket holds {frames}", field=path, hint="Raise data.frames"
        )
    return length
