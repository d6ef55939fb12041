"""What is to be cached: every medium of the sources once, cut into shards, and how much it is."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import shutil
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xllm_jax.assembly import networks
from xllm_jax.core import checksum, sharded_job
from xllm_jax.core.errors import UserError
from xllm_jax.core.progress import Bar
from xllm_jax.core.sharded_job import Shards
from xllm_jax.core.stage import Stage
from xllm_jax.core.types import Params
from xllm_jax.data import cached_features, mixture
from xllm_jax.data.media import captions, modalities
from xllm_jax.data.record import Record
from xllm_jax.feature_cache import describe
from xllm_jax.models.xllm import XLLM

PLAN = "plan.json"
OURS = (PLAN, cached_features.MANIFEST, "quarantine*.jsonl", "*.npy", "*.array_record-*", "shards")


@dataclasses.dataclass(frozen=True)
class Job:
    """One modality of a cache.

    Attributes:
      modality, steps: whose first steps are computed.
      through: name of the last of them.
      items: media items per file.
      shape, dtype: of the outcome of one item.
      places: `[n, 3]` int64, source, record and part of the n distinct media, in order.
      table: `features.TABLE` entries.
      per_shard: media per shard.
      fields: the settings that decide the outcome.
    """

    modality: str
    steps: int
    through: str
    items: int
    shape: tuple[int, ...]
    dtype: str
    places: np.ndarray
    table: np.ndarray
    per_shard: int
    fields: Mapping[str, Any]

    @property
    def bytes_each(self) -> int:
        """Bytes of a medium at most; zeros at its end are not kept."""
        steps = self.items * int(np.prod(self.shape)) * jnp.dtype(self.dtype).itemsize
        return cached_features.HEAD.size + 4 * self.items + steps

    def about(self) -> dict[str, Any]:
        """The job as JSON, but for the media themselves."""
        names = ("modality", "steps", "through", "items", "shape", "dtype", "per_shard", "fields")
        made = {name: getattr(self, name) for name in names}
        digest = hashlib.sha256(self.table.tobytes()).hexdigest()[:16]
        return json.loads(json.dumps(made | {"media": len(self.places), "digest": digest}))


@dataclasses.dataclass(frozen=True)
class FeatureCachePlan:
    """A cache that is to be written.

    Attributes:
      stage: that will read it.
      xllm: its networks.
      output: the folder.
      config: how the user named the stage, for messages.
      sources: {name: examples}.
      jobs: one per modality.
    """

    stage: Stage
    xllm: XLLM
    output: Path
    config: str
    sources: mixture.Sources
    jobs: tuple[Job, ...]

    def shards(self, job: Job, identity: str = "") -> Shards:
        """The shards of a modality; those of the plan `identity` alone count as finished."""
        name, media = job.modality, len(job.places)
        return Shards(self.output, name, media, job.per_shard, name, identity)

    def medium(self, job: Job, row: int) -> tuple[str, Record]:
        """(path, record) of a medium."""
        source, index, part = (int(value) for value in job.places[row])
        name = list(self.sources)[source]
        record = Record(self.sources[name][index], name, 0, index, self.stage.seed)
        return captions.media_of(record.example)[part][1], record


def make(
    stage: Stage, output: str | Path, config: str, per_shard: int, asked: Sequence[str] = ()
) -> FeatureCachePlan:
    """Plans the cache of a stage; reads its sources' texts, and no medium.

    Args:
      stage: that will read the cache.
      output: folder of the cache.
      config: how the user named the stage, for messages.
      per_shard: media in each shard but the last.
      asked: modalities; empty for all that have something frozen.

    Raises:
      UserError: what `describe.depths` raises, or no medium.
    """
    stage = dataclasses.replace(stage, data=dataclasses.replace(stage.data, cache=""))
    xllm = networks.model(stage)
    depths = describe.depths(stage, xllm, asked)
    names = mixture.mixture(stage.data)
    sources = {n: mixture.of_stage(n, stage.data) for n in names}
    found = scan(stage, sources, list(depths))
    jobs = tuple(
        _job(stage, xllm, name, depths[name], *distinct(*found[name]), per_shard)
        for name in depths
        if len(found[name][0])
    )
    if not jobs:
        raise UserError(f"no example has {' or '.join(depths)}", field="data.sources")
    return FeatureCachePlan(stage, xllm, Path(output), config, sources, jobs)


def scan(
    stage: Stage, sources: mixture.Sources, names: Sequence[str]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Finds every medium of the sources, without reading one.

    Args:
      stage: that will read the cache.
      sources: {name: examples}.
      names: modalities to be found.

    Returns:
      {modality: digests `[m]` uint64 and places `[m, 3]` int64 of every medium}.
    """
    digests = {name: array("Q") for name in names}
    places = {name: array("q") for name in names}
    total = sum(map(len, sources.values()))
    for number, index, record in Bar(_records(stage, sources), "media", total, unit="records"):
        if record is None:
            continue
        for part, (modality, path) in enumerate(captions.media_of(record.example)):
            if modality not in digests:
                continue
            try:
                count = cached_features.wanted(modality, record, stage.data)
            except UserError:
                continue  # training leaves this example out, too
            digests[modality].append(cached_features.digest(modality, path, count, stage.data.root))
            places[modality].extend((number, index, part))
    return {
        name: (
            np.frombuffer(digests[name], np.uint64),
            np.frombuffer(places[name], np.int64).reshape(-1, 3),
        )
        for name in names
    }


def _records(stage: Stage, sources: mixture.Sources) -> Iterator[tuple[int, int, Record | None]]:
    for number, name in enumerate(sources):
        for index in range(len(sources[name])):
            drawn = mixture.draw(sources, name, 0, index, stage.seed, 0)
            yield number, index, drawn if isinstance(drawn, Record) else None


def distinct(digests: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(places of the distinct media in order, their `features.TABLE`)."""
    values, first = np.unique(digests, return_index=True)
    order = np.argsort(first, kind="stable")
    table = np.zeros(len(values), cached_features.TABLE)
    table["digest"] = values
    table["record"][order] = np.arange(len(order))
    return places[first[order]], table


def _job(
    stage: Stage,
    xllm: XLLM,
    modality: str,
    steps: int,
    places: np.ndarray,
    table: np.ndarray,
    per_shard: int,
) -> Job:
    found, chain = modalities.find(modality, stage.data), xllm.chain(modality)
    items = found.items(stage.data)
    given = (
        jax.ShapeDtypeStruct((items, *found.shape(stage.data)), jnp.float32),
        *(jax.ShapeDtypeStruct((items,), jnp.int32) for _ in range(2)),
    )
    run = functools.partial(outcome, xllm, modality, steps)
    made, _ = jax.eval_shape(run, networks.shapes(xllm), *given)
    fields = describe.fields(stage, xllm, modality, steps)
    through = str(chain[steps - 1])
    shape, dtype = tuple(made.shape[1:]), str(made.dtype)
    return Job(modality, steps, through, items, shape, dtype, places, table, per_shard, fields)


def outcome(
    xllm: XLLM, modality: str, steps: int, params: Params, *given: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """What a modality's first steps give; `given` are values, lengths and counts of items."""
    if modality in xllm.encoders:
        values, lengths, _ = given
        made = xllm.apply(
            params, xllm.encoders[modality], values.astype(jnp.int32), method="states"
        )
        return made, lengths
    return xllm.run_sections(params, modality, slice(0, steps), *given)


def summary(plan: FeatureCachePlan) -> str:
    """What the cache will hold and take, one line per modality and one for all."""
    lines = [
        f"{job.modality}: {len(job.places):,} media, {job.through} gives {list(job.shape)} "
        f"{job.dtype}, at most {_size(job.bytes_each)} each, {_size(_bytes(job))} in all"
        for job in plan.jobs
    ]
    return "\n".join([*lines, f"at most {_size(sum(map(_bytes, plan.jobs)))} in {plan.output}"])


def check_capacity(plan: FeatureCachePlan, most: float) -> None:
    """Checks that the cache is as large as the user wants, and fits the disk.

    Args:
      most: GiB that it may take.

    Raises:
      UserError: too large.
    """
    total = sum(map(_bytes, plan.jobs))
    if total > most * 2**30:
        hint = f"--most_gib={-(-total // 2**30)} writes it"
        raise UserError(f"the cache may take {_size(total)}", field="--most_gib", hint=hint)
    free = shutil.disk_usage(_existing(plan.output)).free
    left = sum(
        job.bytes_each * shards.rows_in(shards.todo())
        for job in plan.jobs
        for shards in [plan.shards(job)]
    )
    if left > free:
        what = f"the cache may take {_size(left)}, {_size(free)} are free"
        raise UserError(what, field=str(plan.output), hint="Choose another --output")


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def _bytes(job: Job) -> int:
    return job.bytes_each * len(job.places)


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


def items(plan: FeatureCachePlan, base: Mapping[str, str]) -> dict[str, str]:
    """What hosts that write one cache must have in common, by name."""
    found = {f"parameters.{path}": text for path, text in base.items()}
    for job in plan.jobs:
        about = job.about()
        fields = {name: str(value) for name, value in about.pop("fields").items()}
        found |= fields | {f"{job.modality}.{name}": str(value) for name, value in about.items()}
    return found


def begin(plan: FeatureCachePlan, base: Mapping[str, str], again: bool = False) -> str:
    """Notes the plan in its folder, or takes up the one that is there.

    Args:
      plan: what to do.
      base: {parameter: checksum} of what computes it.
      again: empty a folder that holds another cache.

    Returns:
      The plan's identity.

    Raises:
      UserError: the folder holds another cache; says what differs.
    """
    about = {"jobs": [job.about() for job in plan.jobs], "base": dict(base)}
    identity, file = checksum.of_json(about), plan.output / PLAN
    found = sharded_job.known(file)
    if again and found and found["identity"] != identity:
        empty(plan.output)
    hint = "Add --again to write it anew, or choose another --output"

    def difference(then: dict[str, Any]) -> str:
        return f"another cache: {_first_difference(then, about)}"

    sharded_job.begin(file, identity, about, difference, hint)
    return identity


def begun_older(plan: FeatureCachePlan) -> bool:
    """Whether the folder holds this plan with checksums of before, see `checksum.identity`."""
    found = sharded_job.known(plan.output / PLAN)
    return bool(found) and any(map(checksum.is_older, found["base"].values()))


def _first_difference(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The first difference of two plans, in words."""
    old, new = ({job["modality"]: job for job in about["jobs"]} for about in (then, now))
    for name in sorted(old.keys() | new.keys()):
        if name not in old or name not in new:
            return f"{name} is in one of them only"
        field, how = describe.difference(old[name].pop("fields"), new[name].pop("fields"))
        if field:
            return f"{field} {how}"
        for key in old[name]:
            if old[name][key] != new[name].get(key):
                return f"{name} has another {key}"
    changed = sorted(path for path in now["base"] if then["base"].get(path) != now["base"][path])
    return f"{changed[0].split('/')[0]} has other parameters" if changed else "other parameters"


def empty(folder: Path) -> None:
    """Removes a cache's files."""
    for pattern in OURS:
        for path in folder.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
