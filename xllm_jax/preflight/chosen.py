"""What was chosen for a stage on a slice: as a file of flags, in words, and kept for the next time.

A choice is kept on the host by everything that it depends on: the stage, the slice, and the code
and versions that made it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xllm_jax.core import atomic, bounded, fingerprint, host_cache
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Stage
from xllm_jax.core.text_lines import split_lines
from xllm_jax.preflight import choose, micro_batch
from xllm_jax.preflight.targets import Target

FIELDS = {
    "stage", "slice", "flags", "rows", "accumulation", "seconds_an_update", "samples_per_second",
    "compiled", "ranked", "memory", "notes",
}  # fmt: skip


def find(stage: Stage, target: Target, again: bool = False) -> dict[str, Any]:
    """The choice as plain data: that of an earlier call, or a new one.

    Args:
      stage, target: as of `choose.choose`.
      again: choose anew, whatever was chosen before.

    Raises:
      UserError: see `choose.choose`.
    """
    file = host_cache.folder("chosen") / f"{key(stage, target)}.json"
    if not again:
        with contextlib.suppress(OSError, ValueError, RecursionError, UserError):
            kept = bounded.read_json(file)
            if isinstance(kept, dict) and kept.keys() >= FIELDS:
                return kept | {"kept": True}
    record = plain(choose.choose(stage, target), stage, target)
    with contextlib.suppress(OSError, UserError):  # else it is searched again the next time
        atomic.write_json(file, record)
    return record | {"kept": False}


def key(stage: Stage, target: Target) -> str:
    """What a choice depends on, as a hash."""
    compiler = importlib.util.find_spec("libtpu") is not None
    parts = [
        fingerprint.configuration(stage),
        target.title,
        fingerprint.code(),
        importlib.metadata.version("libtpu") if compiler else "no compiler",
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def plain(made: choose.Choice, stage: Stage, target: Target) -> dict[str, Any]:
    """A choice as plain data.

    Args:
      made: the choice.
      stage, target: what it was made for.
    """
    update = stage.data.examples * stage.optimizer.accumulation
    return {
        "stage": stage.name,
        "slice": target.title,
        "flags": list(made.flags),
        "rows": micro_batch.rows(made.stage),
        "accumulation": made.stage.optimizer.accumulation,
        "seconds_an_update": made.seconds,
        "samples_per_second": update / made.seconds if made.seconds else 0.0,
        "compiled": made.compiled,
        "ranked": made.ranked,
        "memory": made.made.memory.total if made.made else 0,
        "notes": list(made.notes),
    }


def text(found: dict[str, Any]) -> str:
    """The choice in words, a few lines."""
    how = (
        f"by the compiler's cycles of {found['compiled']} of {found['ranked']} candidates"
        if found["compiled"]
        else f"by arithmetic alone ({found['ranked']} candidates, none compiled: the TPU compiler "
        "is not installed or refused them)"
    )
    flags = " ".join(found["flags"]) or "the stage as it is configured"
    lines = [
        f"{found['stage']} on {found['slice']}: {found['rows']} rows x {found['accumulation']}, "
        f"{found['samples_per_second']:.0f} samples/s {how}",
        f"with          {flags}",
    ]
    lines += [f"before        {note}" for note in found["notes"]]
    return "\n".join(lines + (["              (chosen earlier)"] if found["kept"] else []))


def write(file: Path, given: Sequence[str], found: dict[str, Any]) -> None:
    """Writes a file for `--flagfile`: what the user gave, then what was chosen.

    Args:
      file: is whole or not there.
      given: `--config…` of the command line.
      found: what `find` gives.
    """
    lines = [f"# {line}" for line in split_lines(text(found))]
    atomic.write_text(file, "\n".join([*lines, *given, *found["flags"]]) + "\n")
