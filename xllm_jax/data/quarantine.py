"""Quarantine: the list of records that could not be read, and when there are too many of them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from xllm_jax.core import atomic, disk
from xllm_jax.core.errors import UserError
from xllm_jax.core.text_lines import split_lines
from xllm_jax.data.record import Skipped

ENOUGH = 100  # records seen before a share says anything


class Quarantine:
    """Counts records and bad ones, and appends every bad file to `quarantine.jsonl`.

    A line holds `file`, `key`, `reason`, `count`: how often the file has been met, and `drawn`:
    examples of the stream before its batch. A run that resumes at an earlier place drops the lines
    behind it, which it will write again: the file always shows one uninterrupted run.

    Args:
      path: the file; None keeps the counts only.
      max_share: largest share of bad records that is put up with.
      drawn: examples of the stream before the place where reading starts.
    """

    def __init__(self, path: str | Path | None, max_share: float, drawn: int = 0):
        self.path = Path(path) if path else None
        self.max_share = max_share
        self.seen = 0
        self.bad = 0
        self.last: Skipped | None = None  # the last bad record since the start
        self.counts = self._kept(drawn)  # how often each file was met

    def add(
        self, seen: int, skipped: Iterable[Skipped], at_end: bool = False, drawn: int = 0
    ) -> None:
        """Counts `seen` more records, of which the bad ones among `skipped` could not be read.

        Args:
          seen: records of one batch.
          skipped: those of them that it lacks.
          at_end: of an epoch; then few records are enough to judge.
          drawn: examples of the stream before the batch.

        Raises:
          UserError: too large a share is bad; names the last file and its reason.
        """
        self.seen += seen
        for record in skipped:
            if record.bad:
                self.last = record
                self.bad += 1
                name = record.file or record.key
                self.counts[name] = self.counts.get(name, 0) + 1
                self._write(record, name, drawn)
        share = self.bad / max(self.seen, 1)
        if share > self.max_share and (self.seen >= ENOUGH or at_end):
            last = self.last
            told = f", the last one {last.file or last.key}: {last.reason}" if last else ""
            raise UserError(
                f"{self.bad} of {self.seen} records could not be read{told}",
                field="data.max_bad_share",
                hint=f"Mend the files{f' listed in {self.path}' if self.path else ''}",
            )

    def state(self) -> dict[str, int]:
        """Counts as JSON."""
        return {"seen": self.seen, "bad": self.bad}

    def restore(self, state: Mapping[str, int]) -> None:
        """Takes up the counts of `state`."""
        self.seen, self.bad = int(state["seen"]), int(state["bad"])

    def _kept(self, drawn: int) -> dict[str, int]:
        """Drops the lines from `drawn` on; counts of the files on those that stay."""
        if self.path is None or not self.path.exists():
            return {}
        with atomic.opened(self.path, "r") as file:
            lines = split_lines(file.read())
        kept = [(line, found) for line in lines if (found := _parsed(line))["drawn"] < drawn]
        if len(kept) < len(lines):
            atomic.write_text(self.path, "".join(f"{line}\n" for line, _ in kept))
        return {found["file"]: found["count"] for _, found in kept}

    def _write(self, record: Skipped, name: str, drawn: int) -> None:
        if self.path is None:
            return
        disk.make_folder(self.path.parent)
        line = {
            "file": name,
            "key": record.key,
            "reason": record.reason,
            "count": self.counts[name],
            "drawn": drawn,
        }
        with disk.writing(self.path), atomic.opened(self.path) as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _parsed(line: str) -> dict[str, Any]:
    """A line of the file; one that a kill cut off counts as behind every place."""
    try:
        return {"drawn": 0} | json.loads(line)
    except ValueError:
        return {"drawn": math.inf}
