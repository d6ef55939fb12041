"""Quarantine: the list of records that could not be read, and when there are too many of them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from xllm_jax.core.errors import UserError
from xllm_jax.data.record import Skipped

ENOUGH = 100  # records seen before a share says anything


class Quarantine:
    """Counts records and bad ones, and appends every bad file to `quarantine.jsonl`.

    Args:
      path: the file; None keeps the counts only.
      max_share: largest share of bad records that is put up with.
    """

    def __init__(self, path: str | Path | None, max_share: float):
        self.path = Path(path) if path else None
        self.max_share = max_share
        self.seen = 0
        self.bad = 0
        self.last: Skipped | None = None  # the last bad record since the start
        self.counts: dict[str, int] = {}  # how often each file was met since the start

    def add(self, seen: int, skipped: Iterable[Skipped], at_end: bool = False) -> None:
        """Counts `seen` more records, of which the bad ones among `skipped` could not be read.

        Args:
          at_end: of an epoch; then few records are enough to judge.

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
                self._write(record, name)
        share = self.bad / max(self.seen, 1)
        if share > self.max_share and (self.seen >= ENOUGH or at_end):
            last = self.last
            told = f", the last one {last.file or last.key}: {last.reason}" if last else ""
            raise UserError(
                f"{self.bad} of {self.seen} records could not be read{told}",
                field="data.max_bad_share",
                mend=f"Mend the files{f' listed in {self.path}' if self.path else ''}",
            )

    def state(self) -> dict[str, int]:
        """Counts as JSON."""
        return {"seen": self.seen, "bad": self.bad}

    def restore(self, state: dict[str, int]) -> None:
        """Takes up the counts of `state`."""
        self.seen, self.bad = int(state["seen"]), int(state["bad"])

    def _write(self, record: Skipped, name: str) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = {
            "file": name,
            "key": record.key,
            "reason": record.reason,
            "count": self.counts[name],
        }
        with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
