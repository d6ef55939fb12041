"""Scores of sets as JSON and tables: values, intervals, controls, gains over another run.

The control of every score is the same answers given to the wrong samples: each gets that of the
next one. What is above it comes from looking.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from xllm_jax.data.example import Example
from xllm_jax.evaluation import measure, paired
from xllm_jax.evaluation.answer_store import Answered
from xllm_jax.evaluation.scorers import Score
from xllm_jax.report.suite_page import difference, interval
from xllm_jax.report.tables import Cell, Table

Scorer = Callable[[Sequence[str], Sequence[Example]], dict[str, Score]]
NOTE = "Shuffled: the same answers, each given to the next sample."
COMPARED = (
    " Gain: how much better than the baseline on the same samples; p by randomizing whose answer "
    "is whose."
)


def scored(score: Scorer, one: Answered, other: Answered | None = None) -> dict[str, Any]:
    """A set's scores as JSON.

    Args:
      score: of answers.
      one: the set with its answers.
      other: another run's.

    Returns:
      {'samples', 'failed', 'metrics': {name: {'value', 'low', 'high', 'samples', 'higher',
      'shuffled', 'groups', and with another run 'baseline' and 'gain'}}}.
    """
    found = score(one.answers, one.examples)
    wrong = score([*one.answers[1:], *one.answers[:1]], one.examples)
    before = score(other.answers, other.examples) if other else {}
    groups = measure.groups(one.examples)
    metrics = {}
    for name, this in found.items():
        metrics[name] = measure.plain(this.estimate()) | {
            "higher": this.higher,
            "shuffled": measure.plain(wrong[name].estimate()),
            "groups": {tag: measure.plain(this.estimate(rows)) for tag, rows in groups.items()},
        }
        if name in before:
            metrics[name]["baseline"] = measure.plain(before[name].estimate())
            metrics[name]["gain"] = paired.compared(before[name], this)
    return {"samples": len(one.examples), "failed": one.failures, "metrics": metrics}


def of_metric(
    title: str, metric: str, scale: float, sets: Mapping[str, Any], names: Mapping[str, str]
) -> Table:
    """One metric of all sets that have it.

    Args:
      title: of the metric.
      metric: its name in 'metrics'.
      scale: what values are multiplied by.
      sets: {set: what `scored` returns}.
      names: {set: title}.
    """
    chosen = {name: one for name, one in sets.items() if metric in one["metrics"]}
    compared = any("gain" in one["metrics"][metric] for one in chosen.values())
    head = ("", "[95 %]", "samples", "failed", "shuffled")
    head += ("baseline", "gain [95 %]", "p") if compared else ()
    rows = []
    for name, one in chosen.items():
        found = one["metrics"][metric]
        row = [Cell(names[name]), interval(found, scale), Cell(str(one["samples"]))]
        row += [Cell(str(one["failed"]), False if one["failed"] else None)]
        row += [interval(found["shuffled"], scale)]
        if "gain" in found:
            row += [interval(found["baseline"], scale), *difference(found["gain"], scale)]
        rows.append((*row, *[Cell("")] * (len(head) - len(row))))
    return Table(title, NOTE + (COMPARED if compared else ""), head, tuple(rows))


def of_groups(title: str, metric: str, scale: float, one: Mapping[str, Any]) -> Table:
    """One metric of a set by the tags of its samples."""
    groups = one["metrics"].get(metric, {}).get("groups", {})
    rows = tuple(
        (Cell(tag), interval(found, scale), Cell(str(found["samples"])))
        for tag, found in groups.items()
    )
    return Table(title, "", ("", "[95 %]", "samples"), rows)
