"""Choosing in a process of its own, beside one that holds the chips.

The TPU compiler for a slice that is described, and not there, is the one that `xllm preflight` has:
the same choice, and the same place in the cache. It runs without the chips, keeps its gigabytes to
itself, and an end of it is no end of the training.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Stage
from xllm_jax.preflight import absent, choose, chosen
from xllm_jax.preflight.targets import Target

SECONDS = 1800.0  # bound on a search that should take ten minutes
Search = Callable[[Stage, Target, int], dict[str, Any]]


def search(
    stage: Stage,
    target: Target,
    rows: int = 0,
    seconds: float = SECONDS,
    search_: Search = chosen.search,
) -> dict[str, Any]:
    """As `chosen.search`; by arithmetic where the other process ends without an answer.

    Args:
      stage, target, rows: as there.
      seconds: that it may take.
      search_: what the other process runs.

    Raises:
      UserError: as there.
    """
    if not target.chip.axes:  # arithmetic, which needs no compiler
        return chosen.search(stage, target, rows)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    given = (theirs, search_, stage, target, rows)
    process = context.Process(target=_answer, args=given, daemon=True)
    process.start()
    theirs.close()
    try:
        kind, answer = ours.recv() if ours.poll(seconds) else ("late", f"after {seconds:.0f} s")
    except EOFError:
        process.join()
        kind, answer = "dead", f"exit code {process.exitcode}"
    finally:
        process.kill()
        process.join()
        ours.close()
    if kind == "wrong":
        what, field, hint = answer
        raise UserError(what, field=field, hint=hint)
    if kind == "found":
        return answer
    line = f"The search for the best micro-batch gave no answer ({answer}); arithmetic decides"
    print(line, file=sys.stderr, flush=True)
    return chosen.plain(choose.choose(stage, target, tries=0, rows=rows), stage, target)


def _answer(pipe: Connection, search_: Search, *given: object) -> None:
    """In the other process: searches, and says what came of it."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    absent.prepare()
    try:
        pipe.send(("found", search_(*given)))
    except UserError as error:
        pipe.send(("wrong", (error.what, error.field, error.hint)))


def _end_with_parent() -> None:
    """A parent that is killed has nobody left who would stop this process."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
