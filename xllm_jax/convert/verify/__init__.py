"""Replays recordings of PyTorch code: the same weights and inputs through our networks.

A recording is a folder of `.npz` files with settings and tolerances beside them;
`docs/recording.md` tells how to make one. Its family is recognized by what the folder holds,
wherever it lies; `chatglm`, `vision`, `speech`, `nextgpt` and `diffusion` replay one each.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType

import jax

from xllm_jax.convert.verify import chatglm, diffusion, nextgpt, speech, tolerances, vision
from xllm_jax.convert.verify.recording import PASS, UNUSED, Comparison, Replay
from xllm_jax.convert.verify.tolerances import Tolerances
from xllm_jax.core.errors import UserError

FAMILIES = (
    diffusion,
    nextgpt,
    chatglm,
    vision,
    speech,
)  # the first that recognizes a folder replays it


@dataclasses.dataclass(frozen=True)
class Recording:
    """One recorded folder; weights that its files share are read once.

    Attributes:
      folder: where it lies.
      tolerances: as it states them.
      steps: {file that can be replayed: what replays it}.
    """

    folder: Path
    tolerances: Tolerances
    steps: Mapping[str, Callable[[Replay], None]]

    def replay(self, file: str) -> list[Comparison]:
        """Replays one of the `steps`; one comparison per recorded array.

        Raises:
          UserError: the file is unreadable.
        """
        one = Replay(self.folder / file, self.tolerances)
        with jax.default_matmul_precision("highest"):
            one.attempt(self.steps[file])
        return one.finish()


def recordings(folder: str | Path) -> list[Recording]:
    """The recording in a folder, or those directly below it; empty where there is none.

    Raises:
      UserError: the tolerances of one are unreadable.
    """
    folder = Path(folder)
    for homes in ([folder], sorted(path for path in folder.glob("*") if path.is_dir())):
        fitting = [
            (home, next((f for f in FAMILIES if f.recognized(home)), None)) for home in homes
        ]
        found = [(home, family) for home, family in fitting if family]
        if found:
            return [
                Recording(home, tolerances.read(home, family.TOLERANCES), family.steps(home))
                for home, family in found
            ]
    return []


def replay(folder: str | Path, progress: Callable[[str], None] = print) -> list[Comparison]:
    """Replays a recording, or every recording directly below a folder.

    Args:
      folder: of one recording, or of several.
      progress: receives a line per file.

    Returns:
      One comparison per recorded array; `Comparison.file` is relative to the folder.

    Raises:
      UserError: no recording here, or a file of it is unreadable.
    """
    folder = Path(folder)
    found = recordings(folder)
    if not found:
        raise UserError(
            "not a recording that we know",
            field=str(folder),
            hint=f"A recording holds .npz files of {', '.join(map(_name, FAMILIES))}; "
            "docs/recording.md tells how to make one",
        )
    return [row for one in found for row in _replay_all(one, folder, progress)]


def table(comparisons: Iterable[Comparison]) -> str:
    """The comparisons as text: a line per array, then a line per file, then the verdict."""
    comparisons = list(comparisons)
    wide = max([len(f"{row.file} {row.array}") for row in comparisons], default=0)
    lines = [f"{'array':<{wide}}  abs error  rel error  tolerance  verdict"]
    for row in comparisons:
        values = (row.absolute, row.relative, row.tolerance)
        numbers = " ".join(f"{'-' if math.isnan(x) else f'{x:.2e}':>10}" for x in values)
        verdict = f"{row.verdict} ({row.note})" if row.note else row.verdict
        lines.append(f"{row.file + ' ' + row.array:<{wide}} {numbers}  {verdict}")
    lines += ["", *_summaries(comparisons)]
    missed = [row for row in comparisons if row.missed]
    count = sum(row.verdict != UNUSED for row in comparisons)
    verdict = f"{len(missed)} of {count} missed" if missed else f"all {count} within tolerance"
    return "\n".join([*lines, verdict])


def _summaries(comparisons: list[Comparison]) -> Iterable[str]:
    """A line per file: arrays compared, and the one that comes nearest to its tolerance."""
    for file in dict.fromkeys(row.file for row in comparisons):
        rows = [row for row in comparisons if row.file == file]
        good = [row for row in rows if row.verdict == PASS]
        line = f"{file}: {len(good)} ok, {sum(row.missed for row in rows)} missed"
        unused = sum(row.verdict == UNUSED for row in rows)
        line += f", {unused} not compared" if unused else ""
        near = max(
            (r for r in good if r.tolerance), key=lambda r: r.absolute / r.tolerance, default=0
        )
        if near:
            line += (
                f"; largest error {max(row.absolute for row in good):.1e}; nearest to its "
                f"tolerance {near.array}: {near.absolute:.1e} of {near.tolerance:.1e}"
            )
        yield line


def _name(family: ModuleType) -> str:
    return family.__name__.rpartition(".")[2]


def _replay_all(
    recording: Recording, folder: Path, progress: Callable[[str], None]
) -> Iterable[Comparison]:
    place = "" if recording.folder == folder else f"{recording.folder.name}/"
    for path in sorted(recording.folder.glob("*.npz")):
        if path.name not in recording.steps:
            progress(f"{place}{path.name}: not replayed, nothing here reads such a file")
            continue
        rows = recording.replay(path.name)
        missed = sum(row.missed for row in rows)
        progress(f"{place}{path.name}: {len(rows)} arrays, {missed} missed")
        yield from (dataclasses.replace(row, file=place + row.file) for row in rows)
