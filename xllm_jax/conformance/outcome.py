"""How a check ends, and what all checks share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np

PASSED, FAILED, NOT_APPLICABLE = "passed", "failed", "not applicable"


class Failed(Exception):
    """A check failed; the message says what and where."""


class NotApplicable(Exception):
    """A check does not apply to a network; the message says why."""


B = TypeVar("B")
Check = Callable[[B], str]
"""From a bench to a remark such as a measured distance; raises Failed or NotApplicable."""


@dataclasses.dataclass(frozen=True)
class Result:
    """One line of the table.

    Attributes:
      check: its name.
      outcome: PASSED, FAILED or NOT_APPLICABLE.
      text: what failed and where, why it does not apply, or a remark.
    """

    check: str
    outcome: str
    text: str = ""


def run(checks: Mapping[str, Check[B]], bench: B) -> list[Result]:
    """Runs every check; one that raises anything else has failed, too."""
    results = []
    for name, check in checks.items():
        try:
            results.append(Result(name, PASSED, check(bench)))
        except Failed as error:
            results.append(Result(name, FAILED, str(error)))
        except NotApplicable as error:
            results.append(Result(name, NOT_APPLICABLE, str(error)))
        except Exception as error:  # whatever a new network does
            told = " ".join(str(error).split())[:300]
            results.append(Result(name, FAILED, f"{type(error).__name__}: {told}"))
    return results


def table(name: str, role: str, results: list[Result]) -> str:
    """The results of one network as text, a line a check."""
    width = max(len(result.check) for result in results)
    outcome = max(len(result.outcome) for result in results)
    lines = [f"{name} ({role})"]
    for one in results:
        lines.append(f"  {one.check:{width}}  {one.outcome:{outcome}}  {one.text}".rstrip())
    return "\n".join(lines)


def distance(found: np.ndarray, wanted: np.ndarray) -> float:
    """Largest difference, relative to the largest value; infinite where one is not finite."""
    found, wanted = (np.asarray(x, np.float64) for x in (found, wanted))
    if found.shape != wanted.shape or not (np.isfinite(found).all() and np.isfinite(wanted).all()):
        return float("inf")
    top = np.abs(wanted).max(initial=0.0)
    return float(np.abs(found - wanted).max(initial=0.0) / (top or 1.0))


def close(found: np.ndarray, wanted: np.ndarray, bound: float, what: str) -> float:
    """The `distance`.

    Raises:
      Failed: it is above the bound.
    """
    far = distance(found, wanted)
    if not far <= bound:
        raise Failed(f"{what}: differs by {far:.2g} of the largest value, allowed is {bound:g}")
    return far
