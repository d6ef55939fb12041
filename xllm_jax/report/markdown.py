"""Tables as Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence

from xllm_jax.report.tables import Cell, Table

SIGNS = re.compile(r"([\\`*_{}\[\]<>|#~])")


def escaped(text: str) -> str:
    """A text that Markdown shows as it is, on one line."""
    return SIGNS.sub(r"\\\1", " ".join(text.split()))


def table(made: Table) -> str:
    """One table with its title, the first column to the left, numbers to the right."""
    head = _line([escaped(text) for text in made.head])
    rule = _line([":---", *["---:"] * (len(made.head) - 1)])
    rows = [_line(map(_cell, row)) for row in made.rows]
    parts = [f"## {escaped(made.title)}", "", head, rule, *rows]
    return "\n".join([*parts, "", escaped(made.note)] if made.note else parts)


def _cell(cell: Cell) -> str:
    text = escaped(cell.text)
    return f"**{text}**" if cell.good and text else text


def _line(cells: Sequence[str] | map) -> str:
    return f"| {' | '.join(cells)} |"


def page(title: str, made: Sequence[Table]) -> str:
    """All tables under a title."""
    return "\n\n".join([f"# {escaped(title)}", *map(table, made)]) + "\n"
