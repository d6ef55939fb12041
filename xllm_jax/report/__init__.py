"""The report of an evaluation: tables for the terminal, and one HTML page with the pictures.

    tables.py   what the tables hold: the paper's Tables 1 and 4, the goals, the groups
    text.py     tables as plain text
    page.py     tables, samples and curves as one self-contained HTML page
    media.py    images, video frames and sound as data URIs
    plots.py    loss curves as SVG

All of it reads one plain dict, the JSON of an evaluation:

    measures     {'TASK@MODEL': what `evaluate.measure` returns}
    comparisons  {name: {'title', 'metric', 'value', 'low', 'high', 'samples'}}, positive is better
    cer          in words, what the character error rate counts
    timings      {step: seconds}
    curves       {run: [[step, loss], ...]}
    modalities   {name: 'package.module:NAME'} of further modalities among the samples' files
    settings     {name: value}, shown at the end
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xllm_jax.core import atomic
from xllm_jax.report import page, tables, text


def write(results: Mapping[str, Any], directory: str | Path) -> str:
    """Writes report.json, report.txt and report.html, and returns the text.

    Args:
      results: see above; what is missing is left out of the tables.
      directory: folder, made if needed.
    """
    directory, made = Path(directory), tables.build(results)
    shown = text.report(made)
    atomic.write_json(directory / "report.json", results)  # first: the others are made of it
    atomic.write_text(directory / "report.txt", shown + "\n")
    atomic.write_text(directory / "report.html", page.render(made, results))
    return shown
