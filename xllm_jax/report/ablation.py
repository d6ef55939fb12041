"""The table of an ablation of the LLM: what `xllm ablation` writes to ablation.json, for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xllm_jax.report.tables import NONE, Cell, Table

TASKS = {"vqa": "VQA %", "spoken": "spoken VQA %"}


def table(results: Mapping[str, Any]) -> Table:
    """One row a way to tune.

    Args:
      results: of ablation.json: 'rows', 'seeds', 'steps'.
    """
    rows = results["rows"]
    several = len(results["seeds"]) > 1
    head = ["stage 3"]
    for title in TASKS.values():
        head += [f"{title} [samples]", "difference [runs]" if several else "difference [samples]"]
    made = tuple((Cell(row["title"]), *_cells(row, rows)) for row in rows.values())
    seeds, over = ", ".join(map(str, results["seeds"])), "other trainings (Student's t)"
    note = (
        f"{results['steps']} updates from the same stage-2 runs, seeds {seeds}. Differences are in "
        "points, to the adapters alone of the same seed; of a row that is answered with a packed "
        "base, to the same run with floats. 95 % intervals: [samples] are about other questions, "
        + (f"[runs] about {over}." if several else "and say nothing of other trainings.")
    )
    return Table("Tuning the miniature: stage 3 in several ways", note, tuple(head), made)


def markdown(results: Mapping[str, Any]) -> str:
    """`table` for a page of this repository."""
    made = table(results)
    lines = [made.head, ("---",) * len(made.head)]
    lines += [tuple(cell.text for cell in row) for row in made.rows]
    return "\n".join(["| " + " | ".join(line) + " |" for line in lines] + ["", made.note])


def _cells(row: Mapping[str, Any], rows: Mapping[str, Any]) -> list[Cell]:
    found = []
    for task in TASKS:
        one = row["tasks"].get(task)
        found.append(Cell(_shown(one["value"], one["over_samples"]) if one else NONE))
        less = one and one.get("difference")
        if not less:
            found.append(Cell(NONE))
            continue
        found.append(Cell(_shown(less["value"], less["over_runs"] or less["over_samples"], "+")))
    return found


def _shown(value: float, interval: tuple[float, float], sign: str = "") -> str:
    low, high = (f"{end * 100:{sign}.1f}" for end in interval)
    return f"{value * 100:{sign}.1f} [{low}, {high}]"
