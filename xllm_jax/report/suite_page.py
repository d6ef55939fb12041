"""The result of an evaluation suite, in four forms of the same tables.

results.json     every number, with what it was made of
results.txt      tables for a terminal
results.md       the same as Markdown
results.html     the same as one page that needs nothing else
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xllm_jax.core import atomic
from xllm_jax.report import markdown, page, text
from xllm_jax.report.tables import NO_DATA, Cell, Table


def write(
    title: str, results: Mapping[str, Any], tables: Sequence[Table], directory: str | Path
) -> str:
    """Writes the four files, and returns the text.

    Args:
      title: of the suite.
      results: JSON.
      tables: that the results are shown in; those without rows are left out.
      directory: folder, made if needed.
    """
    directory, made = Path(directory), [table for table in tables if table.rows]
    shown = text.report(made)
    atomic.write_json(directory / "results.json", results)
    atomic.write_text(directory / "results.txt", f"{title}\n\n{shown}\n")
    atomic.write_text(directory / "results.md", markdown.page(title, made))
    body = [f"<h1>{html.escape(title)}</h1>", *map(page.table, made)]
    atomic.write_text(directory / "results.html", page.document(title, page.STYLE, body))
    return shown


def settings(values: Mapping[str, Any]) -> Table:
    """How a result was made."""
    rows = tuple((Cell(name), Cell(str(value))) for name, value in values.items())
    return Table("Settings", "", ("", ""), rows)


def interval(found: Mapping[str, Any], scale: float = 1, decimals: int = 2) -> Cell:
    """'5.31 [4.90, 5.77]' of {'value', 'low', 'high'}."""
    if found.get("value") is None:
        return Cell(NO_DATA)
    value, low, high = (found[name] * scale for name in ("value", "low", "high"))
    return Cell(f"{value:.{decimals}f} [{low:.{decimals}f}, {high:.{decimals}f}]")


def difference(found: Mapping[str, Any], scale: float = 1, decimals: int = 2) -> tuple[Cell, Cell]:
    """(difference with its interval, p) of `evaluation.paired.compared`; good where it is surely
    better, bad where it is surely worse."""
    if found.get("value") is None:
        return Cell(NO_DATA), Cell("")
    sure = found["low"] > 0 or found["high"] < 0
    value, low, high = (found[name] * scale for name in ("value", "low", "high"))
    words = f"{value + 0.0:+.{decimals}f} [{low:+.{decimals}f}, {high:+.{decimals}f}]"
    return Cell(words, found["value"] > 0 if sure else None), Cell(f"{found['p']:.4f}")
