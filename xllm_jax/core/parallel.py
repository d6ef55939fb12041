"""Work done ahead by threads, in order and within a bound."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Entry = TypeVar("Entry")
Result = TypeVar("Result")


def ahead(
    pool: ThreadPoolExecutor, call: Callable[[Entry], Result], rows: Iterable[Entry], most: int
) -> Iterator[Result]:
    """Calls a function in threads, ahead of whoever takes the results, in order.

    Args:
      pool: of the threads.
      call: the function.
      rows: its arguments.
      most: results started and not taken yet.
    """
    rows, waiting = iter(rows), deque[Future[Result]]()
    try:
        while True:
            for row in itertools.islice(rows, most - len(waiting)):
                waiting.append(pool.submit(call, row))
            if not waiting:
                return
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def overlapped(
    entries: Iterable[Entry], size: int, start: Callable[[list[Entry]], Result]
) -> Iterator[tuple[list[Entry], Result]]:
    """Starts a batch on the devices before the results of the last one are taken.

    Args:
      entries: what batches are made of.
      size: entries per batch; the last one may have fewer.
      start: starts computing a batch and returns its results, which need not be there yet.

    Yields:
      (a batch, its results).
    """
    entries, under_way = iter(entries), None
    while batch := list(itertools.islice(entries, size)):
        started = batch, start(batch)
        if under_way:
            yield under_way
        under_way = started
    if under_way:
        yield under_way
