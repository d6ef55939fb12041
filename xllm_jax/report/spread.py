"""The demo's goals over training runs: what several seeds agree on, and where one run lies.

An interval over the test samples of one run knows nothing of other runs. Here a value is one run's,
and the interval is about the mean of all runs that might be done (Student's t).

`recorded.json` beside this file holds the seeds that `benchmarks/demo_seeds.py` ran last.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats

from xllm_jax.report import tables
from xllm_jax.report import text as plain
from xllm_jax.report.tables import Cell, Table

RECORDED = "recorded.json"
SHARE = 0.95

Values = Mapping[str, float]
"""{title of a goal or claim: what one run measured}, in the metric's own scale."""


def values(folder: str | Path) -> dict[str, float]:
    """What a demo's `report.json` says about each goal and claim; what has no value is left out."""
    results = json.loads((Path(folder) / "report.json").read_bytes())
    measures, comparisons = results.get("measures", {}), results.get("comparisons", {})
    found = {
        goal.title: tables.find(measures, goal.measure, goal.metric) for goal in tables.GOALS
    } | {claim.title: comparisons.get(claim.name) for claim in tables.CLAIMS}
    kept = [(title, one) for title, one in found.items() if one and tables.scored(one)]
    return {title: float(entry["value"]) for title, entry in kept}


def recorded() -> dict[str, Any] | None:
    """The runs that were recorded last: 'hash' of the code and 'runs' {seed: Values}; or None."""
    file = resources.files("xllm_jax.report") / RECORDED
    return json.loads(file.read_text("utf-8")) if file.is_file() else None


def mean_interval(samples: np.ndarray, share: float = SHARE) -> tuple[float, float, float]:
    """Mean of `[runs]` and the interval of the mean of all runs; that is endless for one run."""
    mean, count = float(np.mean(samples)), len(samples)
    if count < 2:
        return mean, -np.inf, np.inf
    half = scipy.stats.t.ppf((1 + share) / 2, count - 1) * np.std(samples, ddof=1) / count**0.5
    return mean, mean - float(half), mean + float(half)


def table(runs: Mapping[int, Values]) -> Table:
    """Every goal and claim: mean over runs with its interval, the lowest and the highest run.

    Args:
      runs: {seed: Values}.
    """
    rows = tuple(
        row
        for goal in (*tables.GOALS, *tables.CLAIMS)
        if (row := _row(goal, [run[goal.title] for run in runs.values() if goal.title in run]))
    )
    head = ("", "mean over runs [95 %]", "lowest", "highest", "goal", "runs that meet it")
    seeds = ", ".join(map(str, runs))
    note = f"Training runs with the seeds {seeds} on one world. Intervals are about other runs."
    return Table(f"Goals over {len(runs)} training runs", note, head, rows)


def text(runs: Mapping[int, Values]) -> str:
    """`table` for a terminal."""
    return plain.table(table(runs))


def markdown(runs: Mapping[int, Values]) -> str:
    """`table` for a page of this repository."""
    made = table(runs)
    lines = [made.head, ("---",) * len(made.head)]
    lines += [tuple(cell.text for cell in row) for row in made.rows]
    return "\n".join(["| " + " | ".join(line) + " |" for line in lines] + ["", made.note])


def place(run: Values, known: Mapping[str, Any] | None) -> str:
    """One line: where a run lies among those that were recorded.

    Args:
      run: what it measured.
      known: see `recorded`.
    """
    if not known:
        return "No runs with other seeds are recorded (benchmarks/demo_seeds.py records them)"
    others = list(known["runs"].values())
    outside = []
    for title, value in run.items():
        samples = [other[title] for other in others if title in other]
        if samples and not min(samples) <= value <= max(samples):
            outside.append(title)
    inside = f"{len(run) - len(outside)} of {len(run)} rows lie within the recorded runs"
    inside += f" ({len(others)} seeds, code {known['hash'][:12]})"
    return f"{inside}; outside: {'; '.join(outside)}" if outside else inside


def _row(goal: tables.Goal | tables.Claim, samples: list[float]) -> tuple[Cell, ...]:
    """Empty where no run measured it."""
    if not samples:
        return ()
    numbers = np.array(samples)
    mean, low, high = mean_interval(numbers)
    entry = {"value": mean, "low": low, "high": high}
    shown = tables.number(entry, goal.metric, interval=len(numbers) > 1)
    ends = (tables.number({"value": end}, goal.metric) for end in (numbers.min(), numbers.max()))
    wanted, met = _met(goal, numbers)
    share = Cell(f"{int(met.sum())} of {len(numbers)}", bool(met.all()))
    return (Cell(goal.title), Cell(shown), *map(Cell, ends), Cell(wanted), share)


def _met(goal: tables.Goal | tables.Claim, numbers: np.ndarray) -> tuple[str, np.ndarray]:
    """The goal in words, and which runs meet it."""
    if not isinstance(goal, tables.Goal):
        return "> 0", numbers > 0
    lower = goal.metric == "cer"
    met = numbers <= goal.bound if lower else numbers >= goal.bound
    return f"{'≤' if lower else '≥'} {goal.bound * 100:.0f} %", met
