"""What is to be prepared, cut into shards. The same plan gives the same shards, byte for byte."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Source
from xllm_jax.data import prepared, stream
from xllm_jax.data.example import Example

PLAN = "plan.json"
LOOKED_AT = 100  # records that tell which media a set has


@dataclasses.dataclass(frozen=True)
class Plan:
    """A data set and where it goes.

    Attributes:
      name: of the prepared set.
      source: reader, path, split and options.
      output: its folder.
      records: of the source.
      per_shard: records in each shard but the last.
      modalities: of its examples.
      check: whether every medium is decoded before it is stored.
    """

    name: str
    source: Source
    output: str
    records: int
    per_shard: int
    modalities: tuple[str, ...]
    check: bool = True

    @property
    def shards(self) -> int:
        """How many."""
        return -(-self.records // self.per_shard)

    def places(self, shard: int) -> range:
        """Which records of the source a shard takes."""
        return range(shard * self.per_shard, min((shard + 1) * self.per_shard, self.records))

    def file(self, shard: int) -> Path:
        """The shard's file, named as TFDS names it."""
        ending = f"{shard:05d}-of-{self.shards:05d}"
        return Path(self.output) / f"{self.name}-{self.source.split}.array_record-{ending}"

    def note(self, shard: int) -> Path:
        """Beside the shard: what it holds. Written last, so it says that the shard is whole."""
        return Path(self.output) / "shards" / f"{self.source.split}-{shard:05d}.json"

    def identity(self) -> str:
        """Hash of everything that the shards depend on, except where they lie."""
        about = dataclasses.asdict(dataclasses.replace(self, output=""))
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]

    def todo(self) -> list[int]:
        """Shards that are not finished."""
        return [shard for shard in range(self.shards) if not finished(self, shard)]


def finished(plan: Plan, shard: int) -> bool:
    """Whether a shard is there, of this plan, and as long as its note says."""
    try:
        note = json.loads(plan.note(shard).read_text("utf-8"))
        return note["plan"] == plan.identity() and plan.file(shard).stat().st_size == note["bytes"]
    except (OSError, ValueError, KeyError):
        return False


def examples(plan: Plan) -> Sequence[Example]:
    """The source of a plan."""
    return stream.read(plan.name, plan.source, "")


def make(name: str, source: Source, output: str, per_shard: int, check: bool = True) -> Plan:
    """Plans a source, or takes up the plan that the output folder holds.

    Raises:
      UserError: nothing to read, no record whose media can be told, or another plan's folder.
    """
    if not name.isidentifier() or not name.islower():
        mend = "Lower-case letters, digits and underscores"
        raise UserError(f"{name!r} is no name for a data set", field="--name", mend=mend)
    found = stream.read(name, source, "")
    media = _modalities(found, name)
    if len(set(media)) != len(media):
        what = f"its examples have {' and '.join(media)}; one file of each modality can be stored"
        raise UserError(what, field=name, mend="Train on this source as it is")
    made = Plan(name, source, output, len(found), per_shard, media, check)
    _same_or_new(made)
    return made


def _modalities(found: Sequence[Example], name: str) -> tuple[str, ...]:
    for index in range(min(LOOKED_AT, len(found))):
        try:
            return prepared.modalities(found[index])
        except UserError:
            continue
    raise UserError(f"none of the first {LOOKED_AT} records can be read", field=name)


def _same_or_new(made: Plan) -> None:
    """Notes the plan in its folder.

    Raises:
      UserError: the folder holds what another plan wrote.
    """
    file = Path(made.output) / f"{made.source.split}.{PLAN}"
    about = {"identity": made.identity(), **dataclasses.asdict(made)}
    if file.is_file():
        known = json.loads(file.read_text("utf-8"))
        if known["identity"] != made.identity():
            odd = [k for k in about if k != "identity" and _plain(about[k]) != known.get(k)]
            what = f"holds a set prepared with another {', '.join(odd) or 'plan'}"
            raise UserError(what, field=made.output, mend="Choose another --output, or empty it")
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    write(file, about)


def _plain(value: object) -> object:
    return json.loads(json.dumps(value))


def write(file: Path, content: object) -> None:
    """Writes JSON whole or not at all."""
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    text = json.dumps(content, ensure_ascii=False, indent=1)
    partial.write_text(text + "\n", "utf-8", "backslashreplace")
    partial.replace(file)
