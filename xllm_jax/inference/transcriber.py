"""The stage-1 ASR model as a recognizer: speech files become text."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import cast

import jax
import numpy as np

from xllm_jax.core.errors import UserError
from xllm_jax.core.types import Params
from xllm_jax.data.example import Example
from xllm_jax.data.media import modalities
from xllm_jax.data.record import Record
from xllm_jax.data.text.characters import CharacterVocabulary
from xllm_jax.inference.load_run import Restored
from xllm_jax.models import asr_search
from xllm_jax.models.asr import ASRDecoder
from xllm_jax.models.xllm import XLLM

Array = jax.Array | np.ndarray
ENCODER, INTERFACE, DECODER = "speech_encoder", "speech_interface", "asr_decoder"


class Transcriber:
    """Transcribes with the ASR model of stage 1.

    Args:
      restored: networks and parameters of a stage-1 speech run.
      rows: utterances at a time.
      beams: hypotheses of the search.

    Raises:
      UserError: the run is not one of stage 1.
    """

    def __init__(self, restored: Restored, rows: int = 16, beams: int = 1):
        require(restored.model.networks, restored.stage.name)
        self.model, self.params, self.data = restored.model, restored.params, restored.stage.data
        self.characters = CharacterVocabulary.load(self.data.characters)
        self.rows, self.beams = rows, beams

    def transcribe(self, examples: Sequence[Example]) -> list[str]:
        """Texts of the examples' (last) speech files, in order.

        Raises:
          UserError: an example without speech, or a file that cannot be read.
        """
        loaded = [self._load(example) for example in examples]
        order = sorted(range(len(loaded)), key=lambda i: len(loaded[i]))
        found: dict[int, str] = {}
        for start in range(0, len(order), self.rows):
            group = order[start : start + self.rows]
            found |= dict(zip(group, self._transcribe([loaded[i] for i in group])))
        return [found[i] for i in range(len(examples))]

    def _load(self, example: Example) -> np.ndarray:
        paths = [path for modality, path in example.media if modality == "speech"]
        if not paths:
            raise UserError("has no speech file", field=example.key)
        values, lengths = modalities.load("speech", paths[-1], self.data, Record(example), 0, False)
        return values[0, : lengths[0]]

    def _transcribe(self, group: Sequence[np.ndarray]) -> list[str]:
        longest = max(map(len, group))
        frames = next(size for size in self.data.frames if size >= longest)
        values = np.zeros((self.rows, frames, group[0].shape[1]), np.float32)
        lengths = np.zeros(self.rows, np.int32)
        for row, features in enumerate(group):
            values[row, : len(features)], lengths[row] = features, len(features)
        found = np.asarray(_decode(self.model, self.params, values, lengths, self.beams))
        return [self.characters.decode(row) for row in found[: len(group)]]


def require(parts: Collection[str], field: str) -> None:
    """Raises `UserError` where `parts` lack one of the ASR model."""
    missing = {ENCODER, INTERFACE, DECODER} - set(parts)
    if missing:
        raise UserError(
            f"the run has no {sorted(missing)[0]}",
            field=field,
            hint="Give a run of configs/stage1_speech.py",
        )


def decode(model: XLLM, params: Params, values: Array, lengths: Array, beams: int = 1) -> jax.Array:
    """What the ASR model hears.

    Args:
      model: with the parts of stage 1.
      params: {part: parameters}.
      values: `[batch, frames, bins]` filterbanks; `lengths`: `[batch]` valid frames.
      beams: hypotheses of the search; 1 is greedy.

    Returns:
      Best tokens `[batch, steps]` int32, for `CharacterVocabulary.decode`.
    """
    features, lengths = model.apply(params, ENCODER, values, lengths)
    fired = model.apply(params, INTERFACE, features, lengths, method="fire")
    decoder = cast(ASRDecoder, model.networks[DECODER])
    found = asr_search.search(decoder, params[DECODER], fired.embeddings, fired.counts, beams)
    return found.tokens[:, 0]


_decode = jax.jit(decode, static_argnames=("model", "beams"))
