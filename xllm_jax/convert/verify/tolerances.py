"""How near a replay must come: read from the recording itself, never from us.

Three sources, in this order. `tolerances.json` beside the arrays may state `atol` and `rtol` of an
array, or `max_abs`, the reference's own rounding noise as measured between float32 and float64.
Else the table of tolerances in the recording's README, whose rows a family of recordings finds by
their first words. Else the strict default: 2e-5 of the array's largest value.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xllm_jax.core.errors import UserError
from xllm_jax.core.text_lines import split_lines

FILE, README = "tolerances.json", "README.md"
NUMBER = re.compile(r"(?<![\w.])(?:\d+(?:\.\d+)?e[-+]?\d+|0\.\d+)")
SHARE, NOISES = 2e-5, 20  # of the largest value; times the reference's rounding noise


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """Allowed absolute error of an element: `absolute + relative * |recorded element|`."""

    absolute: float = 0.0
    relative: float = 0.0

    def allowed(self, recorded: np.ndarray) -> np.ndarray:
        """Allowed error of every element, float64 of the same shape."""
        return self.absolute + self.relative * np.abs(recorded.astype(np.float64))


@dataclasses.dataclass(frozen=True)
class Stated:
    """Where the README states the tolerance of some arrays.

    Attributes:
      file, array: shell patterns of the file's and the array's name.
      row: what the first cell of the table's row starts with.
      number: which number of the second cell, from 0.
      scale: 'absolute'; 'relative' to each element; 'largest', times the largest recorded value;
        'at least one', times the largest value or 1, whichever is more.
    """

    file: str
    array: str
    row: str
    number: int = 0
    scale: str = "absolute"


@dataclasses.dataclass(frozen=True)
class Tolerances:
    """All tolerances of one recording; made by `read`."""

    listed: Mapping[str, Mapping[str, Any]]
    rows: Mapping[str, str]
    rules: Sequence[Stated]

    def of(self, file: str, array: str, recorded: np.ndarray) -> Tolerance:
        """Tolerance of a recorded array of numbers.

        Raises:
          UserError: the README has a table, but not the number that this array needs.
        """
        entry = self.listed.get(file, {}).get(array)
        if entry is not None:
            return _listed(entry, _largest(recorded))
        if self.rows:
            for rule in self.rules:
                if fnmatch.fnmatchcase(file, rule.file) and fnmatch.fnmatchcase(array, rule.array):
                    return _scaled(self._number(rule), rule.scale, _largest(recorded))
        return Tolerance(SHARE * _largest(recorded))

    def numbers(self, row: str) -> list[float]:
        """Numbers in the README's row whose first cell starts so; empty without such a row."""
        for start, cell in self.rows.items():
            if start.startswith(row):
                return [float(number) for number in NUMBER.findall(cell)]
        return []

    def _number(self, rule: Stated) -> float:
        numbers = self.numbers(rule.row)
        if len(numbers) > rule.number:
            return numbers[rule.number]
        raise UserError(
            f"no number {rule.number + 1} in the row of tolerances that starts {rule.row!r}",
            field=README,
            hint=f"Add the row, or state the tolerance in {FILE}",
        )


def read(folder: Path, rules: Sequence[Stated] = ()) -> Tolerances:
    """Reads the tolerances of a recording's folder.

    Raises:
      UserError: `tolerances.json` is not what it should be.
    """
    path, readme = folder / FILE, folder / README
    listed: Mapping[str, Any] = {}
    if path.exists():
        try:
            listed = json.loads(path.read_text("utf-8"))["arrays"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"not a list of tolerances ({error})",
                field=str(path),
                hint='It is {"arrays": {FILE: {ARRAY: {"atol": number}}}}',
            ) from error
    rows = _tolerance_rows(readme.read_text("utf-8")) if readme.exists() else {}
    return Tolerances(listed, rows, rules)


def names_listed(folder: Path, file: str) -> list[str]:
    """Arrays that a file holds by the word of `tolerances.json` or of the README's tables."""
    names = list(read(folder).listed.get(file, {}))
    readme = folder / README
    inside = False
    for line in split_lines(readme.read_text("utf-8")) if readme.exists() else ():
        if line.startswith("#"):
            inside = line.lstrip("# ").split(" ")[0] == file
        cells = _cells(line)
        if inside and len(cells) > 2 and cells[0] not in ("name", "array") and cells[0].strip("-"):
            names.append(cells[0].strip("`"))
    return list(dict.fromkeys(names))


def _listed(entry: Mapping[str, Any], largest: float) -> Tolerance:
    if "atol" in entry or "rtol" in entry:
        return Tolerance(entry.get("atol", 0.0), entry.get("rtol", 0.0))
    return Tolerance(max(NOISES * (entry.get("max_abs") or 0.0), SHARE * largest))


def _scaled(number: float, scale: str, largest: float) -> Tolerance:
    if scale == "relative":
        return Tolerance(relative=number)
    return Tolerance(
        number * {"absolute": 1.0, "largest": largest, "at least one": max(1.0, largest)}[scale]
    )


def _largest(recorded: np.ndarray) -> float:
    values = np.abs(recorded.astype(np.float64))
    return float(values[np.isfinite(values)].max(initial=0.0))


def _tolerance_rows(text: str) -> dict[str, str]:
    """{first cell: second cell} of the tables below headings that speak of tolerances."""
    rows, inside = {}, False
    for line in split_lines(text):
        if line.startswith("#"):
            inside = "tolerance" in line.lower()
        cells = _cells(line)
        if inside and len(cells) == 2:
            rows[cells[0]] = cells[1]
    return rows


def _cells(line: str) -> list[str]:
    """Cells of a table's line; a bar between digits or brackets, as in max|x|, is no border."""
    line = line.strip()
    if not line.startswith("|"):
        return []
    return [cell.strip() for cell in re.split(r"(?:^| )\|(?: |$)", line)[1:-1]]
