"""A look at the first records of a stage: do they read, how full do they make a batch?"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence

from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Data
from xllm_jax.data import mixture
from xllm_jax.data.batching import batch_format
from xllm_jax.data.batching.batch_format import BatchFormat
from xllm_jax.data.example import Example
from xllm_jax.data.record import Mode, Record, Skipped


@dataclasses.dataclass(frozen=True)
class Look:
    """What was seen.

    Attributes:
      read: records looked at, over all sources.
      placed: those that came into a batch.
      supervised: their supervised tokens or characters.
      batches: batches that they fill.
      reasons: {why a record was left out: how often}.
      absent: why there was nothing to look at, or ''.
    """

    read: int = 0
    placed: int = 0
    supervised: int = 0
    batches: int = 0
    reasons: dict[str, int] = dataclasses.field(default_factory=dict)
    absent: str = ""


def scan(data: Data, count: int) -> Look:
    """Reads about `count` records, evenly from the start of every source, as training would.

    Data, tokenizer or vocabulary that are not there are no error: `Look.absent` says so.
    """
    try:
        form = batch_format.find(data)
        _ = form.resources  # what is missing ends the look here
        names = mixture.mixture(data)
        sources = {name: mixture.of_stage(name, data) for name in names}
    except UserError as error:
        return Look(absent=str(error))
    each = max(count // max(len(sources), 1), 1)
    drawn = [one for name in sources for one in _first(sources, name, each, data)]
    return _through(drawn, form)


def _first(
    sources: Mapping[str, Sequence[Example]], name: str, each: int, data: Data
) -> list[mixture.Drawn]:
    last = len(data.frames) - 1  # the longest bucket holds every utterance
    taken = mixture.in_order(sources, {name: None})[:each]
    return [
        dataclasses.replace(one, bucket=last) if isinstance(one, Record) else one for one in taken
    ]


def _through(drawn: list[mixture.Drawn], form: BatchFormat) -> Look:
    """Plans and fills batches of these records and counts what became of them."""
    examples, mode = form.data.examples, Mode(train=True)
    reasons = Counter(one.reason for one in drawn if isinstance(one, Skipped))
    records = [one for one in drawn if isinstance(one, Record)]
    placed = supervised = batches = 0
    for start in range(0, len(records), examples):
        plan = form.plan(records[start : start + examples], mode)
        _, unread = form.fill(plan, slice(None), mode)
        reasons.update(skip.reason for skip in (*plan.skipped, *unread))
        placed += len(plan.members(slice(None))) - len(unread)
        supervised += plan.supervised()
        batches += 1
    return Look(len(drawn), placed, supervised, batches, dict(reasons))
