"""What several trainings say of a way to tune: means over seeds, and differences to another way.

Two kinds of doubt are kept apart. With another seed a training ends elsewhere: an interval over
runs is Student's t of the runs' values. Other questions would give other scores: an interval over
samples is the bootstrap's, of each sample's mean over the runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from xllm_jax.evaluation import bootstrap, scorers
from xllm_jax.report import spread

METRIC = "accuracy"
TASKS = ("vqa", "spoken")

Measured = Mapping[str, Any]
"""{task: what `measure.measure` returns}."""


def value(measured: Measured, task: str) -> float:
    """What one run scores in a task."""
    return float(np.mean(measured[task]["metrics"][METRIC]["scores"]))


def row(
    title: str,
    runs: Mapping[int, Measured],
    than: Mapping[int, Measured] | None = None,
    name: str = "",
) -> dict[str, Any]:
    """One row of the table, as JSON.

    Args:
      title: for people.
      runs: {seed: what the run scores}.
      than: of the way that this one is compared with, by the same seeds.
      name: of that way.

    Returns:
      {'title', 'than', 'tasks': {task: {'runs': [value of each], 'value', 'over_samples',
      'over_runs', 'difference'}}}; intervals are [low, high], that over runs None for a single run,
      and 'difference' holds the same of this way less the other one.
    """
    tasks = [task for task in TASKS if all(task in one for one in runs.values())]
    return {
        "title": title,
        "than": name if than else "",
        "tasks": {task: _task(task, runs, than) for task in tasks},
    }


def _task(
    task: str, runs: Mapping[int, Measured], than: Mapping[int, Measured] | None
) -> dict[str, Any]:
    scores = np.stack([_scores(one, task) for one in runs.values()])
    made = _summary(scores, scorers.average(scores.mean(0)).estimate())
    if than is None:
        return made
    for seed in runs:
        if runs[seed][task]["keys"] != than[seed][task]["keys"]:
            raise ValueError(f"two ways answered different samples of {task}")
    other = np.stack([_scores(than[seed], task) for seed in runs])
    estimate = bootstrap.mean_difference(other.mean(0), scores.mean(0))
    return made | {"difference": _summary(scores - other, estimate)}


def _scores(measured: Measured, task: str) -> np.ndarray:
    return np.asarray(measured[task]["metrics"][METRIC]["scores"], np.float64)


def _summary(scores: np.ndarray, estimate: bootstrap.Estimate) -> dict[str, Any]:
    """Of `[runs, samples]`."""
    values = scores.mean(1)
    over = spread.mean_interval(values)[1:] if len(values) > 1 else None
    return {
        "runs": [round(float(one), 6) for one in values],
        "value": round(float(values.mean()), 6),
        "over_samples": [round(estimate.low, 6), round(estimate.high, 6)],
        "over_runs": over and [round(end, 6) for end in over],
    }
