"""Packing: which row of a batch each example stands in, by what it needs and what a row has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

Need = dict[str, int]  # amount of each limited thing


def pack(wanted: Sequence[Need], capacity: Need, rows: int) -> list[int | None]:
    """Row of each entry, or None: of several packings the first that leaves the fewest out.

    First fit in order fills rows to the brim. Even rows, the longest entries first, are better
    where the number of items per row is what is scarce, and balanced ones where supervised tokens
    are scarce too.

    Args:
      wanted: what each entry needs.
      capacity: of a row.
      rows: how many there are.
    """
    ways = (first_fit, even_fit, balanced_fit)
    best: list[int | None] = [None] * len(wanted)
    for way in ways:
        found = way(wanted, capacity, rows)
        if found.count(None) < best.count(None):
            best = found
        if None not in best:
            break
    return best


def first_fit(wanted: Sequence[Need], capacity: Need, rows: int) -> list[int | None]:
    """Row of each entry: the first that holds all it needs, or None.

    Deterministic, in the order given. Of a need that `capacity` does not name a row holds nothing.
    Arguments as of `pack`.
    """
    return _placed(wanted, capacity, rows, range(len(wanted)))


def even_fit(wanted: Sequence[Need], capacity: Need, rows: int) -> list[int | None]:
    """Row of each entry, those with most tokens first: the one with the fewest tokens yet.

    Arguments as of `pack`.
    """
    order = sorted(range(len(wanted)), key=lambda entry: -wanted[entry]["tokens"])
    return _placed(wanted, capacity, rows, order, lambda row, need: -row["tokens"])


def balanced_fit(wanted: Sequence[Need], capacity: Need, rows: int) -> list[int | None]:
    """Row of each entry, the largest first by tokens and supervised tokens together: the one that
    it fills least, by whichever of both is scarcer there.

    Arguments as of `pack`.
    """
    scarce = [name for name in ("tokens", "answers") if capacity.get(name)]

    def size(entry: int) -> float:
        return -sum(wanted[entry].get(name, 0) / capacity[name] for name in scarce)

    def filled(row: Need, need: Need) -> float:
        return max((need.get(name, 0) - row[name]) / capacity[name] for name in scarce)

    return _placed(wanted, capacity, rows, sorted(range(len(wanted)), key=size), filled)


def _placed(
    wanted: Sequence[Need],
    capacity: Need,
    rows: int,
    order: Iterable[int],
    worse: Callable[[Need, Need], float] | None = None,
) -> list[int | None]:
    """Row of each entry, taken in `order`: the first that fits, where `worse` is least."""
    free = [dict(capacity) for _ in range(rows)]
    places: list[int | None] = [None] * len(wanted)
    for entry in order:
        need = wanted[entry]
        fits = (
            number
            for number, row in enumerate(free)
            if all(row.get(name, 0) >= amount for name, amount in need.items())
        )
        if worse:
            place = min(fits, key=lambda number: worse(free[number], need), default=None)
        else:
            place = next(fits, None)
        if place is None:
            continue
        places[entry] = place
        for name, amount in need.items():
            free[place][name] -= amount
    return places
