"""Whether every source of a mixture teaches anything. Reads text only, no media."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping

from xllm_jax.core import sampling
from xllm_jax.core.errors import UserError
from xllm_jax.data import mixture
from xllm_jax.data.pipeline import Pipeline
from xllm_jax.data.record import Record, Skipped

RECORDS = 200  # of each source, spread over all of it


@dataclasses.dataclass(frozen=True)
class Supervision:
    """What some records of one source teach.

    Attributes:
      size: records of the source.
      looked_at: how many of them were turned into rows.
      silent: how many of those have nothing to learn.
      supervised: tokens to be learnt in all of them.
      reasons: {why a record was left out: how often}.
    """

    size: int
    looked_at: int
    silent: int
    supervised: int
    reasons: Mapping[str, int]


def of_sources(pipeline: Pipeline, records: int = RECORDS) -> dict[str, Supervision]:
    """{source: Supervision} of every source that takes part in a training pipeline."""
    return {name: _of_source(pipeline, name, records) for name in pipeline.weights}


def _of_source(pipeline: Pipeline, name: str, records: int) -> Supervision:
    size = len(pipeline.sources[name])
    taught, reasons = [], Counter()
    for place in sampling.evenly(size, records):
        drawn = mixture.draw(pipeline.sources, name, 0, place, pipeline.seed, 0)
        tokens, skipped = _planned(pipeline, drawn)
        taught.append(tokens)
        reasons.update(skip.reason for skip in skipped)
    return Supervision(size, len(taught), taught.count(0), sum(taught), dict(reasons))


def _planned(pipeline: Pipeline, drawn: mixture.Drawn) -> tuple[int, tuple[Skipped, ...]]:
    """Supervised tokens of one record alone in a batch, and why it was left out."""
    if not isinstance(drawn, Record):
        return 0, (drawn,)
    plan = pipeline.format.plan([drawn], pipeline.mode)
    return plan.supervised(), plan.skipped


def refuse_silent(found: Mapping[str, Supervision]) -> None:
    """Looks whether every source teaches something.

    Raises:
      UserError: a source has no supervised token; names it, and the commonest reason.
    """
    for name, one in found.items():
        if not one.supervised:
            why = (
                max(one.reasons, key=lambda reason: one.reasons[reason])
                if one.reasons
                else "answers are empty"
            )
            raise UserError(
                f"0 % of its tokens are supervised in {one.looked_at} records ({why})",
                field=f"data.sources.{name}",
                hint=f"Mend its answers, or leave it out with --config.data.mix.{name}=0",
            )
