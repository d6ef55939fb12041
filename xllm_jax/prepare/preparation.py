"""What is to be prepared, cut into shards. The same plan gives the same shards, byte for byte."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xllm_jax.core import checksum, sampling, sharded_job
from xllm_jax.core.errors import UserError
from xllm_jax.core.sharded_job import Shards
from xllm_jax.core.stage import Source
from xllm_jax.data import mixture
from xllm_jax.data.example import Example
from xllm_jax.data.media.modalities import stored
from xllm_jax.data.media.modality import Modality
from xllm_jax.data.rows import prepared

PLAN = "plan.json"
PER_SHARD = 1024  # records
DEADLINE = 60.0  # seconds that decoding one file may take
MEMORY = 2.0  # gigabytes that it may take
LOOKED_AT = 100  # records, spread over the source, that show which media a set has


@dataclasses.dataclass(frozen=True)
class PreparationPlan:
    """A data set and where it goes.

    Attributes:
      name: of the prepared set.
      source: reader, path, split and options.
      output: its folder.
      records: of the source.
      per_shard: records in each shard but the last.
      modalities: of its examples.
      check: whether every medium is decoded before it is stored.
      several: records have any number of files of each modality (`data/rows/prepared.py`).
      content: hash of some records' texts, so that a source that has changed is another plan.
      deadline: seconds that decoding one file may take in a process of its own; 0 decodes in this
        one, without a deadline.
      memory: gigabytes that it may take there.
    """

    name: str
    source: Source
    output: str
    records: int
    per_shard: int
    modalities: tuple[str, ...]
    check: bool = True
    several: bool = False
    content: str = ""
    deadline: float = DEADLINE
    memory: float = MEMORY

    @functools.cached_property
    def shards(self) -> Shards:
        """Its shards."""
        folder, split, stem = (
            Path(self.output),
            self.source.split,
            f"{self.name}-{self.source.split}",
        )
        return Shards(folder, split, self.records, self.per_shard, stem, self.identity())

    def identity(self) -> str:
        """Hash of everything that the shards depend on, except where they lie."""
        return checksum.of_json(self.described() | {"output": ""})

    def described(self) -> dict[str, Any]:
        """The plan as JSON, without what holds off bad files and is another on another machine."""
        about = dataclasses.asdict(self)
        del about["deadline"], about["memory"], about["source"]["allow_paths"]
        return about

    def media(self) -> dict[str, Modality]:
        """{name: Modality} of the set, in the order of `modalities`."""
        known = stored(self.source)
        return {name: known[name] for name in self.modalities}

    def examples(self) -> Sequence[Example]:
        """The source."""
        return mixture.read(self.name, self.source, "")


def rejected(name: str, place: int, error: UserError) -> dict[str, str]:
    """{'key', 'file', 'reason'} of a record that cannot be used.

    Args:
      name: of its source.
      place: in the source.
      error: that it raises.
    """
    return {"key": f"{name}[{place}]", "file": str(error.field), "reason": error.what}


def make(
    name: str,
    source: Source,
    output: str,
    per_shard: int,
    check: bool = True,
    several: bool | None = None,
    deadline: float = DEADLINE,
    memory: float = MEMORY,
) -> PreparationPlan:
    """Plans a source, or takes up the plan that the output folder holds.

    Args:
      name: of the prepared set.
      source: reader, path, split and options.
      output: folder of the set.
      per_shard: records in each shard but the last.
      check: whether every medium is decoded before it is stored.
      several: whether records may have several files of a modality, or not all the same
        modalities; None decides by a look at some records.
      deadline, memory: of decoding one file, as in `PreparationPlan`.

    Raises:
      UserError: no record can be read, a modality is unknown, or the folder holds another plan.
    """
    if not name.isidentifier() or not name.islower():
        hint = "Lower-case letters, digits and underscores"
        raise UserError(f"{name!r} is no name for a data set", field="--name", hint=hint)
    found = mixture.read(name, source, "")
    seen = _seen(found, name)
    media = {prepared.modalities(one) for one in seen}
    mixed = len(media) > 1 or any(len(set(one)) < len(one) for one in media)
    several = mixed if several is None else several
    known = stored(source)
    for name in sorted({name for one in media for name in one} - known.keys()):
        hint = "Name its record by the reader's option 'modalities'"
        raise UserError(f"unknown modality {name!r}", field=source.reader, hint=hint)
    wanted = tuple(known) if several else prepared.modalities(seen[0])
    content = _hash([dataclasses.replace(one, media=()) for one in seen])
    made = PreparationPlan(
        name,
        source,
        output,
        len(found),
        per_shard,
        wanted,
        check,
        several,
        content,
        deadline,
        memory,
    )
    _begin(made)
    return made


def _seen(found: Sequence[Example], name: str) -> list[Example]:
    """Some records of a source, those that can be read."""
    seen, why = [], ""
    for place in sampling.evenly(len(found), LOOKED_AT):
        try:
            seen.append(found[place])
        except UserError as error:
            why = why or str(error)
    if not seen:
        raise UserError(f"none of {LOOKED_AT} records can be read; the first: {why}", field=name)
    return seen


def _hash(value: object) -> str:
    return hashlib.sha256(repr(value).encode("utf-8", "backslashreplace")).hexdigest()[:16]


def _begin(made: PreparationPlan) -> None:
    about = made.described()

    def difference(known: dict[str, Any]) -> str:
        odd = [key for key in about if json.loads(json.dumps(about[key])) != known.get(key)]
        return f"a set prepared with another {', '.join(odd) or 'plan'}"

    file = Path(made.output) / f"{made.source.split}.{PLAN}"
    hint = "Choose another --output, or empty it"
    sharded_job.begin(file, made.identity(), about, difference, hint)
