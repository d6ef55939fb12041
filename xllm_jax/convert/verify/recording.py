"""One recorded file and what a replay has compared of it so far."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from xllm_jax.convert.verify.tolerances import Tolerances, names_listed
from xllm_jax.core import bounded
from xllm_jax.core.errors import UserError

PASS, MISS, MISSING, UNUSED = "ok", "MISS", "MISSING", "not compared"
NUMBERS = "fiub"  # kinds of dtypes: floats, integers, booleans


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One array, recorded against computed.

    Attributes:
      file, array: where it is recorded.
      absolute: largest absolute error; NaN, like the next two, where nothing was subtracted.
      relative: the same divided by the largest recorded value.
      tolerance: allowed absolute error at the element that comes nearest to it, or passes it most.
      verdict: 'ok', 'MISS', 'MISSING' (not in the file) or 'not compared' (nothing replays it).
      note: what else is to be said.
    """

    file: str
    array: str
    absolute: float = math.nan
    relative: float = math.nan
    tolerance: float = math.nan
    verdict: str = PASS
    note: str = ""

    @property
    def missed(self) -> bool:
        """Whether this comparison fails the recording."""
        return self.verdict in (MISS, MISSING)


class MissingArray(UserError):
    """An array that the replay cannot go on without."""

    def __init__(self, name: str):
        super().__init__("not in the file", field=name)


class Replay:
    """A recorded `.npz` file while it is replayed.

    Read what our code is fed by `input`, compare what it gives by `compare`. What is not recorded
    is not compared, unless the recording lists it: then it is missing.

    Args:
      path: the file.
      tolerances: of its recording.

    Raises:
      UserError: not a readable file of arrays.
    """

    def __init__(self, path: Path, tolerances: Tolerances):
        self.path, self.tolerances = path, tolerances
        try:
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
                self.arrays = {name: file[name] for name in file.files}
        except Exception as error:  # what NumPy raises on damaged files has no bounds
            raise UserError(
                f"not a readable .npz file ({type(error).__name__})",
                field=str(path),
                hint="Record it again",
            ) from error
        self.rows: list[Comparison] = []
        self._inputs: set[str] = set()
        for name in names_listed(path.parent, path.name):
            if name not in self.arrays:
                self._add(name, MISSING, "listed by the recording")

    @property
    def folder(self) -> Path:
        """The recording's folder."""
        return self.path.parent

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def names(self, pattern: str) -> list[str]:
        """Names of the recorded arrays that match a shell pattern."""
        return [name for name in self.arrays if fnmatch.fnmatchcase(name, pattern)]

    def recorded(self, name: str) -> np.ndarray:
        """A recorded array.

        Raises:
          MissingArray: the file does not hold it.
        """
        if name not in self.arrays:
            raise MissingArray(name)
        return self.arrays[name]

    def input(self, name: str, text: bool = False) -> np.ndarray:
        """A recorded array that the replayed code is fed; of numbers, unless `text` is expected.

        Raises:
          MissingArray: the file does not hold it.
          UserError: it holds something else than numbers.
        """
        value = self.recorded(name)
        self._inputs.add(name)
        if value.dtype.kind not in NUMBERS and not text:
            raise UserError(f"of type {value.dtype}, not of numbers", field=name)
        return value

    def weights(self, prefix: str) -> dict[str, np.ndarray]:
        """{name without the prefix: array} of weights that are recorded in this file."""
        return {name[len(prefix) :]: self.input(name) for name in self.names(f"{prefix}*")}

    def about(self) -> dict[str, Any]:
        """The JSON file of the same name beside it: settings of the recorded code.

        Raises:
          UserError: missing or not JSON.
        """
        return read_json(self.path.with_suffix(".json"))

    def compare(
        self,
        name: str,
        value: ArrayLike,
        recorded: np.ndarray | None = None,
        exact: bool = False,
        allowed: np.ndarray | float | None = None,
    ) -> None:
        """Compares a computed value with the recorded array of that name, if there is one.

        Args:
          name: of the array.
          value: any array; integers and booleans must be equal, NaN never is.
          recorded: what to compare with, when that is computed from the array.
          exact: numbers must be equal too.
          allowed: error of every element, where no tolerance of the recording says it.
        """
        if name not in self.arrays:
            return
        value = np.asarray(value)
        recorded = self.arrays[name] if recorded is None else recorded
        if recorded.dtype.kind not in NUMBERS:
            self._add(name, MISS, f"of type {recorded.dtype}, not of numbers")
        elif value.shape != recorded.shape:
            self._add(name, MISS, f"shape {value.shape}, recorded {recorded.shape}")
        elif recorded.dtype.kind != "f" or exact:
            self._compare(name, value, recorded, np.float64(0.0))
        elif allowed is not None:
            self._compare(name, value, recorded, np.asarray(allowed))
        else:
            tolerance = self.tolerances.of(self.path.name, name, recorded)
            finite = np.where(np.isfinite(recorded), recorded, 0.0)
            self._compare(name, value, recorded, tolerance.allowed(finite))

    def check(self, name: str, error: float, allowed: float, note: str) -> None:
        """Compares a statistic of an array's error with a limit that the recording states."""
        verdict = PASS if error <= allowed else MISS
        self._add(name, verdict, note, absolute=error, tolerance=allowed)

    def attempt(self, step: Callable[..., object], *arguments: object) -> None:
        """Runs one part of a replay; what stops it becomes a row, and other parts still run."""
        try:
            step(self, *arguments)
        except UserError as error:
            missing = isinstance(error, MissingArray)
            self._add(error.field or self.path.name, MISSING if missing else MISS, error.what)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            line = str(error).strip().split("\n")[0]
            self._add(self.path.name, MISS, f"{type(error).__name__}: {line}")

    def finish(self) -> list[Comparison]:
        """Every row so far, and one for each array that nothing compared or read."""
        seen = {row.array for row in self.rows} | self._inputs
        for name in self.arrays:
            if name not in seen:
                self._add(name, UNUSED)
        if not any(row.verdict == PASS for row in self.rows):
            self._add(self.path.name, MISS, "nothing in it was compared")
        return self.rows

    def _compare(
        self, name: str, value: np.ndarray, recorded: np.ndarray, allowed: np.ndarray
    ) -> None:
        wide, expected = value.astype(np.float64), recorded.astype(np.float64)
        with np.errstate(invalid="ignore"):  # infinities are equal or a miss
            error = np.where(wide == expected, 0.0, np.abs(wide - expected))
        error = np.where(np.isnan(error), np.inf, error)
        allowed = np.broadcast_to(allowed, error.shape)
        good = error <= allowed
        ratio = np.where(good, error / np.maximum(allowed, 1e-300), np.inf)
        worst = int(np.argmax(ratio)) if error.size else 0
        if not good.all():
            worst = int(np.argmax(np.where(good, -1.0, error - allowed)))
        largest = np.abs(expected[np.isfinite(expected)]).max(initial=0.0)
        top = float(error.max(initial=0.0))
        self._add(
            name,
            PASS if good.all() else MISS,
            "" if good.all() else f"{(~good).sum()} of {good.size} differ",
            absolute=top,
            relative=top / float(largest) if largest else top,
            tolerance=float(np.ravel(allowed)[worst]) if error.size else 0.0,
        )

    def _add(self, name: str, verdict: str, note: str = "", **numbers: float) -> None:
        row = Comparison(self.path.name, name, verdict=verdict, note=note, **numbers)
        told = any(one.array == name and one.verdict == MISSING for one in self.rows)
        if row not in self.rows and not told:
            self.rows.append(row)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of a recording.

    Raises:
      UserError: missing or not JSON.
    """
    try:
        return bounded.read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"not a readable JSON file ({type(error).__name__})",
            field=str(path),
            hint="The replay needs the settings in it",
        ) from error
