"""What is to be prepared, cut into shards. The same plan gives the same shards, byte for byte."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from xllm_jax.core import atomic
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Source
from xllm_jax.data import mixture
from xllm_jax.data.example import Example
from xllm_jax.data.media.modalities import stored
from xllm_jax.data.media.modality import Modality
from xllm_jax.data.rows import prepared

PLAN = "plan.json"
PER_SHARD = 1024  # records
LOOKED_AT = 100  # records, spread over the source, that tell which media a set has


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
      several: records have any number of files of each modality (`data/rows/prepared.py`).
      content: hash of some records' texts, so that a source that has changed is another plan.
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

    def media(self) -> dict[str, Modality]:
        """{name: Modality} of the set, in the order of `modalities`."""
        known = stored(self.source)
        return {name: known[name] for name in self.modalities}

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
    return mixture.read(plan.name, plan.source, "")


def make(
    name: str,
    source: Source,
    output: str,
    per_shard: int,
    check: bool = True,
    several: bool | None = None,
) -> Plan:
    """Plans a source, or takes up the plan that the output folder holds.

    Args:
      several: whether records may have several files of a modality, or not all the same
        modalities; None decides by a look at some records.

    Raises:
      UserError: nothing to read, no record whose media can be told, or another plan's folder.
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
    made = Plan(name, source, output, len(found), per_shard, wanted, check, several, content)
    _same_or_new(made)
    return made


def _seen(found: Sequence[Example], name: str) -> list[Example]:
    """Some records of a source, those that can be read."""
    seen = []
    for place in np.unique(np.linspace(0, len(found) - 1, LOOKED_AT).astype(int)):
        try:
            seen.append(found[int(place)])
        except UserError:
            continue
    if not seen:
        raise UserError(f"none of {LOOKED_AT} records can be read", field=name)
    return seen


def _hash(value: object) -> str:
    return hashlib.sha256(repr(value).encode("utf-8", "backslashreplace")).hexdigest()[:16]


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
            raise UserError(what, field=made.output, hint="Choose another --output, or empty it")
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_json(file, about)


def _plain(value: object) -> object:
    return json.loads(json.dumps(value))
