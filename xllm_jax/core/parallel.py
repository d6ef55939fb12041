"""Work done ahead by threads, in order and within a bound."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


def ahead(
    pool: ThreadPoolExecutor, call: Callable[[int], Any], rows: Iterable[int], most: int
) -> Iterator[Any]:
    """Results of `call` in order, at most `most` of them started and not taken yet."""
    rows, waiting = iter(rows), deque[Future]()
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
