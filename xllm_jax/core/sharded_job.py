"""A job cut into shards, which may be killed at any moment and is continued by the same command.

    FOLDER/[NAME.]plan.json                     what the folder holds, by identity
    FOLDER/STEM.array_record-00000-of-00012     the records of a shard
    FOLDER/shards/NAME-00000.json               its note, written last: it says the shard is whole

Whoever runs the job needs nothing but the folder: shards may be written in any order, by any number
of processes and hosts.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from xllm_jax.core import atomic, bounded
from xllm_jax.core.errors import UserError
from xllm_jax.core.parallel import ahead

NOTES = "shards"  # folder of the notes
Result = TypeVar("Result")


def known(file: Path) -> dict[str, Any] | None:
    """What a plan's file says: {'identity', ...}; None where there is none."""
    return bounded.read_json(file) if file.is_file() else None


def begin(
    file: Path,
    identity: str,
    about: Mapping[str, Any],
    difference: Callable[[dict[str, Any]], str],
    hint: str,
) -> None:
    """Writes a plan to its folder, or takes up the one that is there.

    Args:
      file: of the plan.
      identity: hash of all that the shards depend on.
      about: the plan as JSON.
      difference: says what a folder of another plan holds, given what its file says.
      hint: what the user may do about it.

    Raises:
      UserError: the folder holds another plan.
    """
    found = known(file)
    if found and found["identity"] != identity:
        raise UserError(f"holds {difference(found)}", field=str(file.parent), hint=hint)
    if not found:
        atomic.write_json(file, {"identity": identity, **about})


@dataclasses.dataclass(frozen=True)
class Shards:
    """Numbered rows, cut into shards of one length.

    Attributes:
      folder: of the job.
      name: of its notes.
      total: rows in all.
      per_shard: rows in each shard but the last.
      stem: of the shards' files; '' where a note holds all that is made of its rows.
      plan: identity of the plan that a finished shard must be of; '' accepts any.
    """

    folder: Path
    name: str
    total: int
    per_shard: int
    stem: str = ""
    plan: str = ""

    @property
    def count(self) -> int:
        """Number of shards."""
        return -(-self.total // self.per_shard)

    def rows(self, shard: int) -> range:
        """Which rows a shard takes."""
        return range(shard * self.per_shard, min((shard + 1) * self.per_shard, self.total))

    def file(self, shard: int) -> Path:
        """The shard's file, named as TFDS names it."""
        return self.folder / f"{self.stem}.array_record-{shard:05d}-of-{self.count:05d}"

    def note(self, shard: int) -> Path:
        """The shard's note."""
        return self.folder / NOTES / f"{self.name}-{shard:05d}.json"

    def notes(self) -> list[dict[str, Any]]:
        """What the notes of all shards say."""
        return [bounded.read_json(self.note(s)) for s in range(self.count)]

    def finished(self, shard: int) -> bool:
        """Whether a shard is there, of this plan, and as long as its note says."""
        try:
            note = bounded.read_json(self.note(shard))
            same = not self.plan or note["plan"] == self.plan
            return same and (not self.stem or self.file(shard).stat().st_size == note["bytes"])
        except (OSError, ValueError, KeyError):
            return False

    def drop_damaged(self) -> list[int]:
        """Shards that seem finished but have another checksum; they are to be written again."""
        damaged = []
        for shard in range(self.count):
            if self.finished(shard):
                note = bounded.read_json(self.note(shard))
                if atomic.sha256(self.file(shard)) != note["sha256"]:
                    self.note(shard).unlink()
                    damaged.append(shard)
        return damaged

    def todo(self, among: Iterable[int] | None = None) -> list[int]:
        """Shards that are not finished, of all or of some."""
        return [s for s in (range(self.count) if among is None else among) if not self.finished(s)]

    def rows_in(self, shards: Iterable[int]) -> int:
        """How many rows some shards take together."""
        return sum(len(self.rows(shard)) for shard in shards)

    def read(
        self, shards: Sequence[int], call: Callable[[int], Result], threads: int, most: int
    ) -> Iterator[tuple[int, Iterator[Result]]]:
        """Reads the rows of shards in order, ahead also of the shard that is taken.

        Args:
          shards: which.
          call: reads a row; in threads.
          threads: how many.
          most: rows read and not taken yet.

        Yields:
          (shard, what its rows give), which must be taken to its end.
        """
        rows = itertools.chain.from_iterable(self.rows(shard) for shard in shards)
        with ThreadPoolExecutor(threads) as pool:
            results = ahead(pool, call, rows, most)
            for shard in shards:
                yield shard, itertools.islice(results, len(self.rows(shard)))

    def write(
        self,
        shard: int,
        records: Iterable[tuple[bytes | None, dict[str, Any] | None]],
        options: str,
        about: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Writes a shard and then its note, each whole or not at all.

        Args:
          shard: which.
          records: (what is stored or None, what is wrong with the row or None) of its rows.
          options: of the ArrayRecord writer.
          about: what else the note says.

        Returns:
          The note: {'plan', ..., 'records', 'bytes', 'sha256', 'rejects'}.
        """
        from array_record.python.array_record_module import ArrayRecordWriter

        file, count, rejects = self.file(shard), 0, []
        with atomic.whole(file) as partial:
            writer = ArrayRecordWriter(str(partial), options)
            try:
                for content, reject in records:
                    if content is not None:
                        writer.write(content)
                        count += 1
                    if reject is not None:
                        rejects.append(reject)
            finally:
                writer.close()
            size, digest = partial.stat().st_size, atomic.sha256(partial)
        note = {"plan": self.plan, **(about or {}), "records": count}
        note |= {"bytes": size, "sha256": digest, "rejects": rejects}
        atomic.write_json(self.note(shard), note)
        return note

    def remove_partial(self) -> None:
        """Removes what killed writers of these shards left; to be called when all are finished."""
        shards = range(self.count)
        files = [self.file(s).name for s in shards] if self.stem else []
        atomic.remove_partial(self.folder, {*files, *(self.note(s).name for s in shards)})
