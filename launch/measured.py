"""Measures that outlive their command: each part of an evaluation is written as soon as it is done.

A later call takes a part up where nothing that it depends on has changed: the code, the results of
the runs, the data, the flags. So an evaluation that was stopped goes on, and two parts can be
measured at a time, one core each.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from xllm_jax.core import atomic, bounded, fingerprint
from xllm_jax.core.errors import UserError
from xllm_jax.data.example import Example

Measures = dict[str, Any]  # {'TASK@MODEL': as of `evaluation.measure.measure`}
FOLDER = "measured"


def part(
    name: str, folder: Path, key: str, make: Callable[[], Measures], beside: Sequence[Path] = ()
) -> Measures:
    """The measures of one part, made unless they are there.

    Args:
      name: of the part; its file is FOLDER/NAME.json.
      folder: of the evaluation.
      key: of everything that the measures depend on; others' are made again.
      make: measures.
      beside: what `make` writes besides; without one of these the measures are made again.
    """
    file = folder / FOLDER / f"{name}.json"
    known = _read(file)
    whole = isinstance(known.get("measures"), dict) and all(one.exists() for one in beside)
    if whole and known.get("key") == key:
        return known["measures"]
    made = make()
    atomic.write_json(file, {"key": key, "measures": made})
    return made


def _read(file: Path) -> dict[str, Any]:
    """What an earlier call wrote; nothing where the file is not there or damaged."""
    try:
        known = bounded.read_json(file)
    except (OSError, ValueError, RecursionError, UserError):
        return {}
    return known if isinstance(known, dict) else {}


def key_of(
    folders: Sequence[Path],
    examples: Iterable[Example],
    options: Mapping[str, Any],
    code: Mapping[str, str],
) -> str:
    """Hash of what measures depend on.

    Args:
      folders: of results, such as a run's `final`; one that is not there counts as empty.
      examples: that are asked; of their files, path, size and time count.
      options: of the evaluation, as JSON can hold them.
      code: as of `fingerprint.code`.
    """
    asked = list(examples)
    media = sorted({path for example in asked for _, path in example.media})
    found = {
        "folders": [_state(sorted(folder.rglob("*"))) for folder in folders],
        "examples": repr(asked),
        "media": _state(map(Path, media)),
        "options": dict(options),
        "code": dict(code),
    }
    return fingerprint.digest(json.dumps(found, sort_keys=True).encode())


def _state(files: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Path, bytes and time of every file that is there."""
    sizes = [(str(file), file.stat()) for file in files if file.is_file()]
    return [(name, size.st_size, size.st_mtime_ns) for name, size in sizes]
