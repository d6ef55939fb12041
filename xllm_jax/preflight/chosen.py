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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from xllm_jax.core import atomic, bounded, fingerprint, host_cache
from xllm_jax.core.chips import CHIPS
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Stage
from xllm_jax.core.text_lines import split_lines
from xllm_jax.preflight import choose, micro_batch, targets
from xllm_jax.preflight.targets import Target

FIELDS = {
    "stage": str, "slice": str, "flags": list, "rows": int, "accumulation": int, "mesh": dict,
    "remat": str, "packed": list, "seconds_an_update": float, "samples_per_second": float,
    "compiled": int, "ranked": int, "memory": int, "notes": list,
}  # fmt: skip


def find(
    stage: Stage,
    target: Target,
    again: bool = False,
    rows: int = 0,
    make: Callable[[Stage, Target, int], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """The choice as plain data: that of an earlier call, or a new one.

    Args:
      stage, target, rows: as of `choose.choose`.
      again: choose anew, whatever was chosen before.
      make: chooses, (stage, target, rows) -> record; `search` by default.

    Raises:
      UserError: see `choose.choose`.
    """
    file = host_cache.folder("chosen") / f"{key(stage, target, rows)}.json"
    kept = None if again else read(file)
    if kept is not None:
        return kept | {"kept": True}
    record = (make or search)(stage, target, rows)
    with contextlib.suppress(OSError, UserError):  # else it is searched again the next time
        atomic.write_json(file, record)
    return record | {"kept": False}


def search(stage: Stage, target: Target, rows: int = 0) -> dict[str, Any]:
    """Chooses; arguments, result and errors as of `find`."""
    return plain(choose.choose(stage, target, rows=rows), stage, target)


def read(file: Path) -> dict[str, Any] | None:
    """A choice from a file; None where there is none, or something else."""
    with contextlib.suppress(OSError, ValueError, RecursionError, UserError):
        found = bounded.read_json(file)
        if isinstance(found, dict) and all(
            isinstance(found.get(name), kind) for name, kind in FIELDS.items()
        ):
            return found
    return None


def apply(stage: Stage, found: Mapping[str, Any]) -> Stage:
    """The stage as it was chosen.

    Args:
      stage: as it is configured.
      found: what `find` gives, or a file of it.

    Raises:
      UserError: the choice is one for another stage.
    """
    update = micro_batch.rows(stage) * stage.optimizer.accumulation
    rows, times = found["rows"], found["accumulation"]
    if rows < 1 or rows * times != update or not stage.parts.keys() >= {*found["packed"]}:
        raise UserError(
            f"{rows} rows x {times} were chosen for another stage than {stage.name} with {update} "
            "rows an update",
            field="--config.data.rows=auto",
            hint="Give the same stage again, or choose a new --workdir",
        )
    return choose.variant(stage, rows, found["mesh"], found["remat"], found["packed"])


def key(stage: Stage, target: Target, rows: int = 0) -> str:
    """What a choice depends on, as a hash."""
    compiler = importlib.util.find_spec("libtpu") is not None
    parts = [
        fingerprint.configuration(stage),
        repr(target),
        rows,
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
    seconds = made.seconds if target.kind in CHIPS else 0.0  # others' speed is nominal
    return {
        "stage": stage.name,
        "slice": targets.repeated(target, stage.slices).title,
        "flags": list(made.flags),
        "rows": micro_batch.rows(made.stage),
        "accumulation": made.stage.optimizer.accumulation,
        "mesh": dict(made.stage.mesh),
        "remat": made.stage.remat,
        "packed": choose.packed_parts(stage, made.stage),
        "seconds_an_update": seconds,
        "samples_per_second": update / seconds if seconds else 0.0,
        "compiled": made.compiled,
        "ranked": made.ranked,
        "memory": made.made.memory.total if made.made else 0,
        "notes": list(made.notes),
    }


def text(found: Mapping[str, Any]) -> str:
    """The choice in words, a few lines."""
    lines = [
        f"{found['stage']} on {found['slice']}: {found['rows']} rows x {found['accumulation']}, "
        f"{_grounds(found)}",
        f"with          {' '.join(found['flags']) or 'the stage as it is configured'}",
    ]
    lines += [f"before        {note}" for note in found["notes"]]
    return "\n".join(lines + (["              (chosen earlier)"] if found["kept"] else []))


def _grounds(found: Mapping[str, Any]) -> str:
    """What decided."""
    ranked, speed = found["ranked"], f"{found['samples_per_second']:.0f} samples/s"
    if found["compiled"]:
        return f"{speed} by the compiler's cycles of {found['compiled']} of {ranked} candidates"
    kind = found["slice"].split(" x ")[-1].partition(":")[0]
    if kind not in CHIPS:
        return f"by memory ({ranked} candidates; nobody has stated this device's speed)"
    why = "the TPU compiler is not installed or refused them" if CHIPS[kind].axes else "it is a GPU"
    return f"{speed} by arithmetic alone ({ranked} candidates, none compiled: {why})"


def write(file: Path, given: Sequence[str], found: dict[str, Any]) -> None:
    """Writes a file for `--flagfile`: what the user gave, then what was chosen.

    Args:
      file: is whole or not there.
      given: `--config…` of the command line.
      found: what `find` gives.
    """
    lines = [f"# {line}" for line in split_lines(text(found))]
    atomic.write_text(file, "\n".join([*lines, *given, *found["flags"]]) + "\n")
