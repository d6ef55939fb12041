"""A recording of the reference and what a test has compared of it so far.

A test reads inputs by `input`, compares results by `close` or `equal`, and ends with
`assert_all_used`, so that a recorded array which nothing compares makes the test fail.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np


class Recording:
    """One recorded `.npz` file.

    Args:
      path: the file. Tolerances come from `tolerances.json` beside it where it lists the file.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        with np.load(self.path) as file:
            self.arrays = {name: file[name] for name in file.files}
        listed = self.path.parent / "tolerances.json"
        known = json.loads(listed.read_text())["arrays"] if listed.exists() else {}
        self.noise = known.get(self.path.name, {})
        self.inputs: set[str] = set()
        self.errors: dict[str, tuple[float, float]] = {}  # name -> (largest error, allowed)

    def input(self, name: str) -> np.ndarray:
        """Reads an array that the test feeds to the code under test."""
        self.inputs.add(name)
        return self.arrays[name]

    def names(self, pattern: str = "*") -> list[str]:
        """Names of the recorded arrays that match a shell pattern."""
        return [name for name in self.arrays if fnmatch.fnmatchcase(name, pattern)]

    def tolerance(self, name: str) -> float:
        """Allowed absolute error by the measured noise: max(20 * max_abs, 2e-5 * scale)."""
        expected = np.asarray(self.arrays[name], np.float64)
        scale = float(np.abs(expected[np.isfinite(expected)]).max(initial=0.0))
        return max(20 * ((self.noise.get(name) or {}).get("max_abs") or 0.0), 2e-5 * scale)

    def close(self, name: str, value, atol=None, rtol: float = 0.0) -> None:
        """Asserts that `value` has the recorded shape and values.

        `atol` None: see `tolerance`; an array gives every element its own.
        """
        expected, value = self.arrays[name], np.asarray(value)
        assert value.shape == expected.shape, f"{name}: {value.shape} against {expected.shape}"
        if expected.dtype.kind in "iub":
            return self.equal(name, value)
        atol = self.tolerance(name) if atol is None else atol
        error = np.abs(value.astype(np.float64) - expected.astype(np.float64))
        allowed = np.broadcast_to(atol + rtol * np.abs(expected, dtype=np.float64), error.shape)
        worst = np.argmax(np.where(error <= allowed, error / np.maximum(allowed, 1e-300), np.inf))
        found = (float(error.flat[worst]), float(allowed.flat[worst])) if error.size else (0.0, 0.0)
        self.errors[name] = max(self.errors.get(name, found), found)
        bad = ~(error <= allowed)  # also where a NaN stands
        assert not bad.any(), f"{name}: {bad.sum()} of {bad.size} differ, error {found}"

    def equal(self, name: str, value) -> None:
        """Asserts that integers, booleans or exact values are the recorded ones."""
        np.testing.assert_array_equal(np.asarray(value), self.arrays[name], err_msg=name)
        self.errors.setdefault(name, (0.0, 0.0))

    def report(self) -> str:
        """One line: arrays compared, largest absolute error, largest error as share of allowed."""
        floats = {n: e for n, e in self.errors.items() if e[1] > 0}
        if not floats:
            return f"{self.path.name}: {len(self.errors)} arrays equal"
        large = max(floats, key=lambda n: floats[n][0])
        share = max(floats, key=lambda n: floats[n][0] / floats[n][1])
        return (
            f"{self.path.name}: {len(self.errors)} of {len(self.arrays)} arrays compared; "
            f"largest error {floats[large][0]:.2e} ({large}); nearest to its tolerance {share}: "
            f"{floats[share][0]:.2e} of {floats[share][1]:.2e}"
        )

    def assert_all_used(self, except_: Iterable[str] = ()) -> None:
        """Asserts that every array was compared or read as input, save the patterns `except_`.

        A pattern that excuses nothing is an error too.
        """
        left = [n for n in self.arrays if n not in self.errors and n not in self.inputs]
        for pattern in except_:
            excused = set(fnmatch.filter(left, pattern))
            assert excused, f"{self.path.name}: the exception {pattern!r} excuses nothing"
            left = [name for name in left if name not in excused]
        print(self.report())
        assert not left, f"{self.path.name}: no test compares {left}"
