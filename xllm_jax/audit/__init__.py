"""The supervision audit: what a stage's data really looks like when it reaches the model.

    supervision.py   whether every source teaches anything, by prompts alone
    samples.py       rows of a batch taken apart again: media, words, what is learnt
    counts.py        tokens, lengths, padding over many batches
    page.py          all of it as one HTML page, and as tables for the terminal

Everything is read back from finished batches, so a mistake anywhere between a file and the model
shows here.
"""

from __future__ import annotations

import dataclasses

from xllm_jax.audit import supervision
from xllm_jax.audit.counts import Counts
from xllm_jax.audit.samples import Sample, taken_apart
from xllm_jax.audit.supervision import Supervision
from xllm_jax.core.stage import Stage
from xllm_jax.data.batching import padding
from xllm_jax.data.pipeline import Pipeline

LEAST_BATCHES, MOST_BATCHES = 8, 64


@dataclasses.dataclass(frozen=True)
class Audit:
    """What was found.

    Attributes:
      name: of the stage.
      sources: {source: Supervision}, from records spread over each source.
      counts: over the batches that were made.
      samples: the first ones, in the order of training.
    """

    name: str
    sources: dict[str, Supervision]
    counts: Counts
    samples: tuple[Sample, ...]


def audit(stage: Stage, samples: int = 24, records: int = supervision.RECORDS) -> Audit:
    """Looks at a stage's training data: at media, also where training reads cached features.

    Args:
      stage: whose data.
      samples: how many to show; batches are made until there are as many, and a few at least.
      records: of each source that are looked at without opening files.

    Raises:
      UserError: a source without any supervised token (names it), or data that cannot be read.
    """
    stage = dataclasses.replace(stage, data=dataclasses.replace(stage.data, cache=""))
    pipeline = Pipeline(stage.data, stage.seed)
    found = supervision.of_sources(pipeline, records)
    supervision.refuse_silent(found)
    counts, shown = Counts(padding.hints(stage.data)), []
    batches = pipeline.iterate()
    for number in range(MOST_BATCHES):
        if number >= LEAST_BATCHES and len(shown) >= samples:
            break
        batch, info = next(batches)
        parts = taken_apart(batch, info, pipeline.resources, stage.data)
        counts.add(parts, info)
        shown += parts[: samples - len(shown)]
    return Audit(stage.name, found, counts, tuple(shown))
