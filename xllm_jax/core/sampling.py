"""Places spread over a sequence."""

from __future__ import annotations


def evenly(size: int, most: int) -> list[int]:
    """At most `most` places of a sequence of `size`, from the first to the last, ascending.

    In integers: the floor of a float quotient may lie one below a place that is met exactly.
    """
    count = min(size, most)
    return [i * (size - 1) // max(count - 1, 1) for i in range(count)]
