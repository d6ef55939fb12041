"""Tables as plain text for a terminal."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from xllm_jax.report.tables import Table


def width(text: str) -> int:
    """Columns that a text takes in a terminal; Chinese characters take two."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def table(made: Table) -> str:
    """One table: title, head, rows with aligned columns, note."""
    lines = [list(made.head), *([cell.text for cell in row] for row in made.rows)]
    widths = [max(width(line[i]) for line in lines) for i in range(len(made.head))]
    rule = "─" * (sum(widths) + 2 * (len(widths) - 1))
    body = [_line(line, widths) for line in lines]
    parts = [made.title, rule, body[0], rule, *body[1:], rule]
    return "\n".join([*parts, made.note] if made.note else parts)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    """The first column to the left, numbers to the right."""
    gaps = [" " * (most - width(cell)) for cell, most in zip(cells, widths)]
    shown = [cells[0] + gaps[0], *(gap + cell for gap, cell in zip(gaps[1:], cells[1:]))]
    return "  ".join(shown).rstrip()


def report(tables: Sequence[Table]) -> str:
    """All tables, a blank line between two."""
    return "\n\n".join(table(made) for made in tables)
