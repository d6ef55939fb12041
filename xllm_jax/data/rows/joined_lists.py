"""Two lists of a JSON file of which one belongs to the other: images and captions, in few bytes."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from xllm_jax.data.rows import json_spans
from xllm_jax.data.rows.lazy import Spans

Key = int | str | None


class Groups:
    """Rows of one list gathered under the rows of another that they name.

    Args:
      path: the JSON file.
      above: (name of the list, key of its rows, whether a row is wanted).
      below: (name of the list, key by which its rows name one above).

    Attributes:
      above, below: the rows of both lists.
      whole: `[groups]` int32, rows above that have rows below, in the file's order.
      lost: (which list, row) pairs of rows without a key, and of rows below that name none above.

    Raises:
      UserError: no such file or list, or broken JSON.
    """

    def __init__(
        self,
        path: pathlib.Path,
        above: tuple[str, str, Callable[[Any], bool]],
        below: tuple[str, str],
    ):
        names, wanted = (above[0], below[0]), above[2]

        def own(row: object, _: int) -> tuple[Key, bool]:
            known = _key(row, above[1])
            return known, known is None or wanted(row)

        notes = {names[0]: own, names[1]: lambda row, _: _key(row, below[1])}
        found = json_spans.find(path, notes)
        self.above, self.below = (Spans(path, found[name].spans, name) for name in names)
        self._gather(found[names[0]].notes, found[names[1]].notes)

    def _gather(self, own: Sequence[tuple[Key, bool]], named: Sequence[Key]) -> None:
        places = {key: (number if good else -2) for number, (key, good) in enumerate(own)}
        places[None] = -1
        at = np.fromiter((places.get(key, -1) for key in named), np.int32, len(named))
        counts = np.bincount(at[at >= 0], minlength=len(own))
        self.whole = np.flatnonzero(counts).astype(np.int32)
        self._ends = np.cumsum(counts[self.whole]).astype(np.int32)
        order = np.argsort(at, kind="stable").astype(np.int32)
        self._order = order[np.searchsorted(at[order], 0) :]
        keyless = [("above", number) for number, (key, _) in enumerate(own) if key is None]
        self.lost = keyless + [("below", int(row)) for row in np.flatnonzero(at == -1)]

    def __len__(self) -> int:
        return len(self._order)

    def group(self, index: int) -> tuple[int, int]:
        """(group of the index-th row below, counted group by group; its number therein)."""
        group = int(np.searchsorted(self._ends, index, side="right"))
        return group, index - (int(self._ends[group - 1]) if group else 0)

    def members(self, group: int) -> list[int]:
        """Rows below of a group, in the file's order."""
        start = int(self._ends[group - 1]) if group else 0
        return self._order[start : int(self._ends[group])].tolist()


def _key(row: object, name: str) -> Key:
    value = row.get(name) if isinstance(row, dict) else None
    # True is equal to 1, and no key.
    return value if isinstance(value, int | str) and not isinstance(value, bool) else None
