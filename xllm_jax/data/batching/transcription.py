"""The transcription format: utterances and their characters, for stage 1 of the speech branch."""

from __future__ import annotations

import dataclasses

import numpy as np

from xllm_jax.core.batch import TranscriptionBatch
from xllm_jax.core.errors import UserError
from xllm_jax.data.batching.batch_format import BatchPlan, Entry, RowPerRecord
from xllm_jax.data.example import Example
from xllm_jax.data.media import modalities
from xllm_jax.data.record import DoesNotFit, Mode, Record, Skipped
from xllm_jax.data.text.characters import PAD, CharacterVocabulary

SPEECH = "speech"


@dataclasses.dataclass(frozen=True)
class Utterance(Entry):
    """A record, its file and its character ids with the end token."""

    path: str
    tokens: tuple[int, ...]

    @property
    def supervised(self) -> int:
        """Supervised characters."""
        return len(self.tokens)


class Format(RowPerRecord[Utterance, TranscriptionBatch, CharacterVocabulary]):
    """Filterbanks and transcripts."""

    @property
    def media(self) -> tuple[str, ...]:
        """Modalities whose files a batch may hold."""
        return (SPEECH,)

    def load_resources(self) -> CharacterVocabulary:
        """Loads the characters that the data names.

        Raises:
          UserError: no such file, or speech comes as what this format's model is to learn to make.
        """
        if modalities.featured(self.data):
            what = "recognition trains the speech encoder and CIF, so it needs sounds"
            raise UserError(what, field="data.speech_features", hint="Leave it out")
        return CharacterVocabulary.load(self.data.characters)

    @property
    def row_tokens(self) -> int:
        """Characters of a transcript."""
        return self.data.characters_length

    @property
    def bucketed(self) -> bool:
        """Whether batches differ in the length of their speech."""
        return len(self.data.frames) > 1

    def bucket(self, example: Example) -> int:
        """Length bucket of an utterance by its file's header; the last where that is unreadable."""
        return modalities.bucket(example, self.data, len(self.data.frames) - 1)

    def zeros(self, rows: int, bucket: int = -1) -> TranscriptionBatch:
        """An empty batch, see `BatchFormat.zeros`."""
        shape = modalities.find(SPEECH, self.data).shape(self.data)
        return TranscriptionBatch(
            features=np.zeros((rows, self.data.frames[bucket], *shape[1:]), np.float32),
            lengths=np.zeros(rows, np.int32),
            tokens=np.full((rows, self.data.characters_length), PAD, np.int32),
            token_lengths=np.zeros(rows, np.int32),
        )

    def entry(self, record: Record, mode: Mode) -> Utterance:
        """The row of one record.

        Raises:
          UserError: not one utterance, or no transcript.
          DoesNotFit: a transcript that is too long to be learnt.
        """
        example, most = record.example, self.data.characters_length
        paths = [path for modality, path in example.media if modality == SPEECH]
        if len(paths) != 1:
            raise UserError(f"has {len(paths)} speech files, must have one", field=example.key)
        text = example.transcript or example.answer
        if not text.strip():
            raise UserError("has no transcript", field=example.key)
        tokens = self.resources.encode(text)
        if len(tokens) > most and mode.train:
            what = f"its transcript has {len(tokens)} tokens, data.characters_length holds {most}"
            raise DoesNotFit(what, field=example.key)
        # In evaluation the whole reference is compared; only the loss sees a cut one.
        return Utterance(record, paths[0], tuple(tokens[:most]))

    def fill(
        self,
        plan: BatchPlan[Utterance],
        rows: slice,
        mode: Mode,
        load: modalities.Load = modalities.load,
    ) -> tuple[TranscriptionBatch, list[Skipped]]:
        """Opens the utterances of some rows, see `BatchFormat.fill`.

        Returns:
          ({'features': `[B, U, F]` float32, U frames of the bucket, 'lengths': `[B]` int32,
          'tokens': `[B, S]` int32, 'token_lengths': `[B]` int32}, the records that could not be
          read). A row without an utterance has both lengths 0.
        """
        mine, frames = plan.rows[rows], self.data.frames[plan.bucket]
        batch = self.zeros(len(mine), plan.bucket)
        skipped: list[Skipped] = []
        for number, utterance in ((n, entry) for n, row in enumerate(mine) for entry in row):
            record, path = utterance.record, utterance.path
            try:
                values, lengths = load(SPEECH, path, self.data, record, 0, mode.train)
                length = _bounded(int(lengths[0]), frames, path)
            except DoesNotFit as error:
                if mode.strict:
                    raise
                skipped.append(Skipped(record.example.key, error.what))
                continue
            except UserError as error:
                skipped.append(Skipped(record.example.key, error.what, True, error.field))
                continue
            batch.features[number, :length] = values[0, :length]
            batch.lengths[number] = length
            batch.tokens[number, : len(utterance.tokens)] = utterance.tokens
            batch.token_lengths[number] = len(utterance.tokens)
        return batch, skipped

    def padding(self, batch: TranscriptionBatch) -> dict[str, tuple[int, int]]:
        """{kind of place: (used, capacity)}: filterbank frames and characters."""
        rows, frames = batch.features.shape[:2]
        return {
            SPEECH: (int(batch.lengths.sum()), rows * frames),
            "characters": (int(batch.token_lengths.sum()), batch.tokens.size),
        }


def _bounded(length: int, frames: int, path: str) -> int:
    if length > frames:
        raise DoesNotFit(
            f"has {length} frames, its bucket holds {frames}", field=path, hint="Raise data.frames"
        )
    return length
