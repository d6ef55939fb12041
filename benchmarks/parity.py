"""How far LLMs, encoders and interfaces are from PyTorch's classes: tables of what tests measure.

    PYTHONPATH=. python benchmarks/parity.py [--tests=test_causal,test_siglip]

Runs the named tests, which compare with transformers' classes with random weights, and prints for
each network and each test the largest distance, relative to the largest value of PyTorch's. The
tests fail above 1e-5.
"""

from __future__ import annotations

import argparse
import collections
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

TESTS = Path(__file__).parents[1] / "tests"
NAMES = ("test_causal", "test_siglip", "test_clip_vision", "test_whisper", "test_interfaces")


def relative(ours: Any, theirs: Any, where: Any) -> float:
    """Largest distance over the largest value; `where` is what of both is compared."""
    theirs = np.asarray(theirs.detach() if hasattr(theirs, "detach") else theirs, np.float64)
    where = ... if isinstance(where, float) else where  # a tolerance
    ours, theirs = np.asarray(ours, np.float64)[where], theirs[where]
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


class Recorder:
    """A plugin of pytest that notes what the tests' `close` compares."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str, str], float] = collections.defaultdict(float)
        self.item: Any = None

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        self.item, module = item, cast(Any, item).module
        if not hasattr(module.close, "noted"):
            module.close = self._noting(module.close)

    def _noting(self, close: Callable) -> Callable:
        def noting(ours: Any, theirs: Any, *more: Any) -> None:
            close(ours, theirs, *more)
            name, _, case = self.item.name.partition("[")
            network, check = named(case.rstrip("]"), name.removeprefix("test_"))
            key = (self.item.module.__name__, network, check)
            self.found[key] = max(self.found[key], relative(ours, theirs, (*more, ...)[0]))

        noting.noted = True
        return noting


def named(case: str, test: str) -> tuple[str, str]:
    """(network, what is compared): of a test's parameters those that name a family, and others."""
    words = case.split("-") if case else []
    networks = [word for word in words if re.match(r"(llama|qwen|glm)", word)]
    rest = [word for word in words if word not in networks]
    return " ".join(networks), " ".join([test.replace("_", " "), *rest])


def tables(found: dict[tuple[str, str, str], float]) -> Iterator[str]:
    """Markdown, one table a file of tests: a row a comparison, a column a network."""
    for module in dict.fromkeys(key[0] for key in found):
        mine = {key[1:]: value for key, value in found.items() if key[0] == module}
        networks = list(dict.fromkeys(network for network, _ in mine))
        yield (
            f"| {module}.py | " + " | ".join(name or "largest distance" for name in networks) + " |"
        )
        yield "| --- |" + " --- |" * len(networks)
        for check in dict.fromkeys(check for _, check in mine):
            cells = (mine.get((name, check)) for name in networks)
            shown = ("" if cell is None else f"{cell:.0e}" for cell in cells)
            yield f"| {check} | " + " | ".join(shown) + " |"
        yield ""


def main() -> None:
    """Runs the tests and prints the tables; exits as pytest does."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tests", default=",".join(NAMES))
    recorder, given = Recorder(), parser.parse_args()
    files = [str(TESTS / f"{name}.py") for name in given.tests.split(",")]
    chosen = "gradients or transformers or given or cached or packed or states or torch or window"
    code = pytest.main(["-q", "-k", chosen, *files], plugins=[recorder])
    print("\n" + "\n".join(tables(recorder.found)))
    sys.exit(code)


if __name__ == "__main__":
    main()
