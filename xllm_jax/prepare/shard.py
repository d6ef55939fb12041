"""One shard: its records are read, checked, serialized and written whole or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xllm_jax.core import atomic
from xllm_jax.core.errors import UserError
from xllm_jax.data import mixture
from xllm_jax.data.example import Example
from xllm_jax.data.rows import prepared
from xllm_jax.prepare import plan as planning
from xllm_jax.prepare.plan import Plan


def write(plan: Plan, shard: int, found: Sequence[Example]) -> dict[str, Any]:
    """Writes a shard and its note; a finished one is left alone.

    Args:
      plan: of the whole set.
      shard: which.
      found: the plan's source.

    Returns:
      The note: {'plan', 'shard', 'file', 'records', 'bytes', 'sha256', 'rejects': [{'key', 'file',
      'reason'}]}.
    """
    file, note = plan.file(shard), plan.note(shard)
    if planning.finished(plan, shard):
        return {}
    note.parent.mkdir(parents=True, exist_ok=True)
    partial = atomic.partial_name(file)
    records, rejects = _records(plan, shard, found, partial)
    made = {
        "plan": plan.identity(),
        "shard": shard,
        "file": file.name,
        "records": records,
        "bytes": partial.stat().st_size,
        "sha256": atomic.sha256(partial),
        "rejects": rejects,
    }
    partial.replace(file)
    atomic.write_json(note, made)
    return made


def _records(
    plan: Plan, shard: int, found: Sequence[Example], file: Path
) -> tuple[int, list[dict[str, str]]]:
    """Writes the records that can be used; returns their number and the others."""
    from array_record.python.array_record_module import ArrayRecordWriter

    media = plan.media()
    kinds, records, rejects = prepared.features(media, plan.several), 0, []
    writer = ArrayRecordWriter(str(file), "group_size:1")
    try:
        for place in plan.places(shard):
            try:
                example = mixture.checked(found[place])
                row = prepared.row(example, media, plan.check, plan.several)
            except UserError as error:
                key = f"{plan.name}[{place}]"
                rejects.append({"key": key, "file": error.field, "reason": error.what})
                continue
            writer.write(prepared.serialized(row, kinds))
            records += 1
    finally:
        writer.close()
    return records, rejects
