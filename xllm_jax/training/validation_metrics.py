"""Metrics of a task that held-out data are measured by, beside the objective's own."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import jax
import numpy as np

from xllm_jax.assembly.system import System
from xllm_jax.core.batch import Batch, TranscriptionBatch
from xllm_jax.core.errors import UserError
from xllm_jax.core.types import Params
from xllm_jax.core.weighted_mean import WeightedMean
from xllm_jax.data.example import Example
from xllm_jax.data.text.characters import CharacterVocabulary
from xllm_jax.evaluation import error_rate, scorers
from xllm_jax.inference import transcriber
from xllm_jax.models.xllm import XLLM

Array = jax.Array | np.ndarray
Planned = Sequence[tuple[int, Example]]  # (row, example) of a global batch
Read = TypeVar("Read", bound=Batch, contravariant=True)
Made = TypeVar("Made")


class Metric(Protocol[Read, Made]):
    """A metric of a task: what networks make of a batch, and what that is worth."""

    def outputs(self, params: Params, batch: Read) -> Made:
        """Small arrays of a global batch; part of the compiled step."""
        ...

    def measured(self, outputs: Made, planned: Planned) -> WeightedMean:
        """What the examples of the batch add, on the host."""
        ...


@dataclasses.dataclass(frozen=True)
class CharacterErrors:
    """Character error rate of the ASR model's greedy decoding, as launch/evaluate.py counts it."""

    model: XLLM
    characters: CharacterVocabulary
    form: str = "normalized"

    @classmethod
    def of(cls, system: System, form: str = "normalized") -> CharacterErrors:
        """For the system of a stage.

        Args:
          system: of the stage.
          form: in which form transcripts are compared, a name of `error_rate.FORMS`.

        Raises:
          UserError: it is not stage 1, speech.
        """
        transcriber.require(system.stage.parts, "validation.metrics")
        return cls(system.model, CharacterVocabulary.load(system.stage.data.characters), form)

    def outputs(self, params: Params, batch: TranscriptionBatch) -> tuple[Array, Array]:
        """(tokens `[B, steps]`, target lengths `[B]`, 0 where a file could not be read)."""
        tokens = transcriber.decode(self.model, params, batch.features, batch.lengths)
        return tokens, batch.token_lengths

    def measured(self, outputs: tuple[Array, Array], planned: Planned) -> WeightedMean:
        """Errors, and characters of the references."""
        errors = length = 0
        for row, example in planned:
            if outputs[1][row]:
                heard = self.characters.decode(outputs[0][row])
                pair = scorers.reference(example), heard
                wrong, said = error_rate.character_errors(*pair, self.form)
                errors, length = errors + wrong, length + said
        return WeightedMean(errors, length)


METRICS: dict[str, Callable[[System], Metric]] = {
    "cer": CharacterErrors.of,
    "cer_untagged": functools.partial(CharacterErrors.of, form="untagged"),
}


def find_metrics(names: Sequence[str]) -> dict[str, Callable[[System], Metric]]:
    """Metrics of the task by name.

    Raises:
      UserError: there is no such metric.
    """
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise UserError(
            f"unknown metric {unknown[0]!r}",
            field="validation.metrics",
            hint=f"Choices: {', '.join(METRICS)}",
        )
    return {name: METRICS[name] for name in names}
