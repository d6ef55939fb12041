"""Audio at 16 kHz, one channel, 16 bits, in the folders it came in.

OUTPUT/…        every audio file of INPUT under its own name (WAV of WAV, otherwise FLAC), and
                copies of all other files, so that a set's reader reads OUTPUT as it read INPUT
OUTPUT/resampled.json     counts, and every file that could not be used with its reason
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xllm_jax.core import atomic, litter
from xllm_jax.core.errors import UserError
from xllm_jax.data.media.reach import Reach
from xllm_jax.data.sources import layout
from xllm_jax.prepare import engine, runner, transforms


def build(
    input: str,
    output: str,
    beam: Sequence[str] = (),
    workers: int = 0,
    allow_paths: Sequence[str] = (),
) -> dict[str, Any]:
    """Converts a folder.

    Args:
      input: folder with audio files, sub-folders included.
      output: folder of the new ones.
      beam, workers: as of `runner.options`.
      allow_paths: folders that links among the files may lead to.

    Returns:
      {'files', 'copied', 'rejected', 'reasons': {reason: count}}.

    Raises:
      UserError: no audio file, none that can be used, or a link that leads outside.
    """
    sounds, others = found(Path(input))
    within = Reach([input, *allow_paths])
    for path in (*sounds, *others):
        within.check(path)
    if not sounds:
        raise UserError("has no audio files", field=input, hint="Check the path")
    if Path(output).resolve() == Path(input).resolve():
        raise UserError("is the folder of the input", field="--output", hint="Choose another")
    rejects = convert(sounds, input, output, beam, workers)
    if len(rejects) == len(sounds):
        why = rejects[0]
        raise UserError(f"no file can be used; {why['file']}: {why['reason']}", field=input)
    for path in others:
        copy(path, Path(output) / path.relative_to(input))
    atomic.remove_partial(Path(output))
    counts = {
        "files": len(sounds) - len(rejects),
        "copied": len(others),
        "rejected": len(rejects),
        "reasons": dict(Counter(one["reason"] for one in rejects).most_common()),
    }
    atomic.write_json(Path(output) / "resampled.json", counts | {"rejects": rejects})
    return counts


def found(root: Path) -> tuple[list[str], list[Path]]:
    """(audio files, other files) below a folder, sorted."""
    walked = litter.walk(root, lambda name: True)
    files = sorted(Path(place, name) for place, names in walked for name in names)
    heard = [path for path in files if path.suffix.lower() in layout.SOUNDS]
    return list(map(str, heard)), [path for path in files if path not in set(heard)]


def convert(
    sounds: Sequence[str], root: str, output: str, beam: Sequence[str], workers: int
) -> list[dict[str, str]]:
    """Converts every file; returns those that could not be, with their reasons."""
    step = transforms.Resample(output, root)
    done = engine.Finished({step.file(path): 1 for path in sounds})

    listed = Path(output) / "resampled.json"
    with engine.Progress("16 kHz", len(sounds), done):
        found = runner.mapped(step, sounds, listed, beam, workers)
    return [{"file": path, "reason": reason} for path, _, reason in sorted(found) if reason]


def copy(path: Path, target: Path) -> None:
    """Copies one file whole or not at all; one of the same size and time is left alone."""
    if target.is_file():
        old, new = path.stat(), target.stat()
        if (old.st_size, old.st_mtime_ns) == (new.st_size, new.st_mtime_ns):
            return
    with atomic.whole(target) as partial:
        shutil.copy2(path, partial)
