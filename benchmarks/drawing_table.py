"""What the demo's runs draw rightly, by kind of request: a table for docs/demo.md.

    PYTHONPATH=. python benchmarks/drawing_table.py seeds/seed-1 seeds/seed-2 …

The folders are of finished demos. Cells are means over these runs of the share of requests whose
count, shapes and colors are right; `report.json` tells them sample by sample.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xllm_jax.evaluation import drawing_suite

KINDS = {  # {row: tag of `drawing_suite.requests`}
    "all": "",
    "with places": "placed",
    "of two objects beside each other": "related",
    "of several like each other": "repeated",
    "without places": "plain",
    "with held-out pairs of shape and color": "unseen_pair",
}
COLUMNS = {  # {column: (measure, what it tells of each sample)}
    "in writing": ("drawing", "scores"),
    "ceiling": ("drawing", "ceiling_scores"),
    "by voice": ("drawing_spoken", "scores"),
}
METRIC = "looks"


def table(reports: Sequence[Mapping[str, Any]]) -> str:
    """The table in Markdown.

    Args:
      reports: of the runs.
    """
    tags = {one.key: one.tags for one in drawing_suite.requests()}
    lines = [("request", *COLUMNS), ("---",) * (1 + len(COLUMNS))]
    for kind, tag in KINDS.items():
        cells = [
            mean_of(reports, *column, {key for key, own in tags.items() if not tag or tag in own})
            for column in COLUMNS.values()
        ]
        lines.append((kind, *(f"{100 * cell:.1f}" for cell in cells)))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def mean_of(reports: Sequence[Mapping[str, Any]], measure: str, name: str, keys: set[str]) -> float:
    """Mean over runs of the mean over those samples that are among the keys."""
    shares = []
    for report in reports:
        one = report["measures"][measure]
        pairs = zip(one["keys"], one["metrics"][METRIC][name])
        shares.append(np.mean([score for key, score in pairs if key in keys]))
    return float(np.mean(shares))


if __name__ == "__main__":
    folders = map(Path, sys.argv[1:])
    print(table([json.loads((one / "report.json").read_bytes()) for one in folders]))
