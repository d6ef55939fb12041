"""The description of a finished set: our manifest, and TFDS's own files next to it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from xllm_jax.core import atomic, bounded
from xllm_jax.core.errors import UserError
from xllm_jax.data.rows import prepared
from xllm_jax.prepare.preparation import PreparationPlan


def finish(plan: PreparationPlan) -> dict[str, Any]:
    """Writes manifest.json, dataset_info.json and features.json from the shards' notes.

    Returns:
      The manifest: {'name', 'identity', 'splits': {split: {'records', 'bytes', 'rejected',
      'reasons': {reason: count}, 'shards': [notes]}}}.

    Raises:
      UserError: shards are missing, or nothing could be used.
    """
    todo = plan.shards.todo()
    if todo:
        what = f"{len(todo)} of {plan.shards.count} shards are not written"
        raise UserError(what, field=plan.output, hint="The same command continues")
    plan.shards.remove_partial()
    notes = plan.shards.notes()
    if not sum(note["records"] for note in notes):
        why = notes[0]["rejects"][0]
        what = f"no record can be used; the first one, {why['file']}: {why['reason']}"
        raise UserError(what, field=plan.source.path)
    file = Path(plan.output) / "manifest.json"
    known = bounded.read_json(file) if file.is_file() else {}
    splits = known.get("splits", {}) | {plan.source.split: _split(plan, notes)}
    made = {"name": plan.name, "splits": splits}
    atomic.write_json(file, made)
    shards = {
        name: ([shard["records"] for shard in split["shards"]], split["bytes"])
        for name, split in splits.items()
    }
    about = f"{plan.source.reader} as xllm_jax reads it, prepared by launch/prepare.py."
    prepared.describe(plan.output, plan.name, shards, plan.media(), about, plan.several)
    return made


def _split(plan: PreparationPlan, notes: list[dict[str, Any]]) -> dict[str, Any]:
    rejects = [reject for note in notes for reject in note["rejects"]]
    return {
        "plan": plan.identity(),
        "records": sum(note["records"] for note in notes),
        "bytes": sum(note["bytes"] for note in notes),
        "rejected": len(rejects),
        "reasons": dict(Counter(reject["reason"] for reject in rejects).most_common()),
        "shards": [{k: v for k, v in note.items() if k != "plan"} for note in notes],
    }
