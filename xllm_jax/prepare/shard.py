"""One shard: its records are read, checked, serialized and written whole or not at all."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Data
from xllm_jax.data import guarded
from xllm_jax.data.example import Example
from xllm_jax.data.media import formats, modalities
from xllm_jax.data.media.decode_workers import Decoders
from xllm_jax.data.rows import prepared
from xllm_jax.prepare.preparation import PreparationPlan, rejected

OPTIONS = "group_size:1"  # of the ArrayRecord writer: any record can be read alone


def write(plan: PreparationPlan, shard: int, found: Sequence[Example]) -> dict[str, Any]:
    """Writes a shard and its note; a finished one is left alone.

    Args:
      plan: of the whole set.
      shard: which.
      found: the plan's source.

    Returns:
      The note: {'plan', 'shard', 'file', 'records', 'bytes', 'sha256', 'rejects': [{'key', 'file',
      'reason'}]}.
    """
    if plan.shards.finished(shard):
        return {}
    about = {"shard": shard, "file": plan.shards.file(shard).name}
    return plan.shards.write(shard, _records(plan, shard, found), OPTIONS, about)


def _records(
    plan: PreparationPlan, shard: int, found: Sequence[Example]
) -> Iterator[tuple[bytes | None, dict[str, str] | None]]:
    """(the record, None), or (None, why it cannot be used)."""
    media = plan.media()
    kinds = prepared.features(media, plan.several)
    with _checking(plan) as check:
        for place in plan.shards.rows(shard):
            try:
                example = guarded.example(found, place)
                row = prepared.row(example, media, check, plan.several)
            except UserError as error:
                yield None, rejected(plan.name, place, error)
            else:
                yield prepared.serialized(row, kinds), None


@contextlib.contextmanager
def _checking(plan: PreparationPlan) -> Iterator[Callable[[str, str], None]]:
    """What looks at each (modality, path): a decoder in a worker, in this process, or none."""
    if not plan.check:
        yield lambda modality, path: formats.check(path, modality)
    elif not plan.deadline:
        yield functools.partial(modalities.check, source=plan.source)
    else:
        limits = Data(deadline=plan.deadline, memory=plan.memory, threads=1)
        with contextlib.closing(Decoders(limits)) as decoders:
            yield functools.partial(decoders.check, source=plan.source)
