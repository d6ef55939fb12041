"""Writing a cache: media are decoded ahead, computed on all devices, and kept shard by shard.

Hosts need share nothing but the folder: each takes its shards, whole or not at all, and the one
that ends last describes the cache. So a host that is lost costs its shard under way, and the same
command continues. Hosts that JAX has joined compare what they are about to write, and wait for
each other.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from tqdm import tqdm

from xllm_jax.assembly import networks, parameters
from xllm_jax.core import checksum, hosts, mesh, rules
from xllm_jax.core.atomic import sha256 as file_checksum
from xllm_jax.core.atomic import write_json
from xllm_jax.core.errors import UserError
from xllm_jax.core.parallel import ahead
from xllm_jax.data import cached_features
from xllm_jax.data.media import modalities
from xllm_jax.data.media.decode_workers import Decoders
from xllm_jax.data.quarantine import Quarantine
from xllm_jax.data.record import DoesNotFit, Skipped
from xllm_jax.feature_cache import describe
from xllm_jax.feature_cache import plan as planning
from xllm_jax.feature_cache.plan import Job, Plan

Arrays = tuple[np.ndarray, np.ndarray, int]  # values, lengths, embeddings wanted
LOOKED_AT = 100  # media among which one can be read
EPOCHS = 8  # looked at for randomness

Compute = Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[jax.Array, jax.Array]]


def run(
    plan: Plan,
    batch: int,
    host: int = 0,
    count: int = 1,
    again: bool = False,
    store: hosts.Store | None = None,
) -> dict[str, Any] | None:
    """Writes this host's share of what is missing.

    Args:
      plan: what to do.
      batch: media computed at a time, over this host's devices.
      host, count: which one, of how many.
      again: replace another cache in the folder.
      store: of the hosts; None when they share the folder alone.

    Returns:
      What the finished cache says about itself; None while other hosts are at work.

    Raises:
      UserError: the folder holds another cache, hosts would write different ones, too many media
        are bad, or a loader draws at random without saying so.
    """
    device_mesh = mesh.make({"data": -1}, jax.local_devices())
    params = computing(plan, device_mesh)
    base = checksum.of_tree(params)
    hosts.meet(store, "planned")  # reading the sources takes one longer than another
    hosts.agree(store, "cache", planning.items(plan, base))
    identity = hosts.share(store, "cache", lambda: planning.begin(plan, base, again))
    name = f"quarantine-{host}.jsonl" if count > 1 else "quarantine.jsonl"
    quarantine = Quarantine(plan.output / name, plan.stage.data.max_bad_share)
    load = Decoders(plan.stage.data).load if plan.stage.data.deadline else modalities.load
    for job in plan.jobs:
        mine = range(host, job.shards, count)
        todo = [s for s in mine if not planning.finished(plan, job, s, identity)]
        if todo:
            steady(plan, job, load)
            rows = sum(len(job.rows(shard)) for shard in mine)
            done = rows - sum(len(job.rows(shard)) for shard in todo)
            with tqdm(total=rows, initial=done, desc=job.modality, unit="items") as bar:
                compute = computation(plan, job, device_mesh, params)
                _shards(plan, job, todo, load, compute, batch, identity, quarantine, bar.update)
    hosts.meet(store, "written")
    return hosts.share(store, "description", lambda: finish(plan, identity, base))


def computing(plan: Plan, device_mesh: Any) -> dict[str, Any]:
    """What the jobs compute with, a copy on every device; nothing else is loaded."""
    steps = [step for job in plan.jobs for step in plan.xllm.chain(job.modality)[: job.steps]]
    shapes = rules.flatten(networks.shapes(plan.xllm))
    only = [path for path in shapes if any(step.owns(path) for step in steps)]
    dtypes = rules.unflatten(dict.fromkeys(shapes, np.dtype(plan.stage.frozen)))
    return parameters.parameters(plan.stage, plan.xllm, device_mesh, dtypes, only)


def computation(plan: Plan, job: Job, device_mesh: Any, params: Mapping[str, Any]) -> Compute:
    """(values `[R * items, ...]`, lengths and counts `[R * items]`) to what the steps give."""
    compiled = jax.jit(functools.partial(planning.outcome, plan.xllm, job.modality, job.steps))
    sharding = NamedSharding(device_mesh, mesh.batch_spec())

    def compute(*arrays: np.ndarray) -> tuple[jax.Array, jax.Array]:
        with jax.set_mesh(device_mesh):
            return compiled(params, *(jax.device_put(array, sharding) for array in arrays))

    return compute


def _shards(
    plan: Plan,
    job: Job,
    todo: list[int],
    load: modalities.Load,
    compute: Compute,
    batch: int,
    identity: str,
    quarantine: Quarantine,
    told: Callable[[int], Any],
) -> None:
    batch = -(-batch // jax.local_device_count()) * jax.local_device_count()
    found, data = modalities.find(job.modality, plan.stage.data), plan.stage.data
    room = (batch, found.items(data), *found.shape(data))
    rows = itertools.chain.from_iterable(job.rows(shard) for shard in todo)
    with ThreadPoolExecutor(max(plan.stage.data.threads, 1)) as pool:
        read = functools.partial(_read, plan, job, load)
        decoded = ahead(pool, read, rows, 2 * batch)
        for shard in todo:
            count = len(job.rows(shard))
            made = computed(itertools.islice(decoded, count), compute, room)
            write_shard(plan, job, shard, made, identity, quarantine, told)


def _read(plan: Plan, job: Job, load: modalities.Load, row: int) -> Arrays | tuple[UserError, str]:
    """A decoded medium, or why it cannot be, with the key of its example."""
    path, record = plan.medium(job, row)
    data = plan.stage.data
    try:
        values, lengths = load(job.modality, path, data, record, 0, True)
        return values, lengths, cached_features.wanted(job.modality, record, data)
    except UserError as error:
        return error, record.example.key


def computed(
    decoded: Iterator[Any], compute: Compute, room: tuple[int, ...]
) -> Iterator[bytes | tuple[UserError, str]]:
    """Records in order, or what is wrong with a medium and its example's key.

    While one batch is on the devices, the next is put together.

    Args:
      decoded: what `_read` gives.
      compute: the steps.
      room: shape of the values of a batch, `(media, items, ...)`.
    """
    under_way: tuple[list[Any], Any] | None = None
    while True:
        entries = list(itertools.islice(decoded, room[0]))
        started = (entries, compute(*_stacked(entries, room))) if entries else None
        if under_way:
            yield from _records(room[1], *under_way)
        if not started:
            return
        under_way = started


def _stacked(entries: list[Any], room: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """One batch; rows of bad media and behind the end are empty."""
    values = np.zeros(room, np.float32)
    lengths, counts = np.zeros((2, *room[:2]), np.int32)
    for row, entry in enumerate(entries):
        if not isinstance(entry[0], UserError):
            values[row], lengths[row], counts[row] = entry
    return values.reshape(-1, *room[2:]), lengths.reshape(-1), counts.reshape(-1)


def _records(
    items: int, entries: list[Any], made: tuple[jax.Array, jax.Array]
) -> Iterator[bytes | tuple[UserError, str]]:
    values, lengths = (np.asarray(array) for array in made)
    values, lengths = (array.reshape(-1, items, *array.shape[1:]) for array in (values, lengths))
    for row, entry in enumerate(entries):
        bad = isinstance(entry[0], UserError)
        yield entry if bad else cached_features.packed(values[row], lengths[row])


def write_shard(
    plan: Plan,
    job: Job,
    shard: int,
    records: Iterable[bytes | tuple[UserError, str]],
    identity: str,
    quarantine: Quarantine,
    told: Callable[[int], Any] = lambda count: None,
) -> None:
    """Writes one shard and its note, whole or not at all.

    Args:
      plan, job, shard: which.
      records: its records in order; errors are kept as such.
      identity: of the plan.
      quarantine: hears of every medium.
      told: is called with 1 for every medium.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    file, note = plan.path(job, shard), plan.note(job, shard)
    note.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{secrets.token_hex(8)}.partial")
    writer, rejects = ArrayRecordWriter(str(partial), "group_size:1,uncompressed"), []
    try:
        for record in records:
            if not isinstance(record, bytes):
                error, key = record
                bad = not isinstance(error, DoesNotFit)
                rejects.append(Skipped(key, error.what, bad, str(error.field)))
                record = cached_features.rejected(error)
            writer.write(record)
            told(1)
    finally:
        writer.close()
    quarantine.add(len(job.rows(shard)), rejects)
    made = {
        "plan": identity,
        "records": len(job.rows(shard)),
        "bytes": partial.stat().st_size,
        "sha256": file_checksum(partial),
        "rejects": [dataclasses.asdict(one) for one in rejects],
    }
    partial.replace(file)
    write_json(note, made)


def steady(plan: Plan, job: Job, load: modalities.Load) -> None:
    """Loads one medium for several epochs.

    Raises:
      UserError: it is not the same in all of them, and no option of the modality says so.
    """
    data = plan.stage.data
    for row in range(min(LOOKED_AT, len(job.places))):
        path, record = plan.medium(job, row)
        epochs = (dataclasses.replace(record, epoch=epoch) for epoch in range(EPOCHS))
        try:
            first, *others = (load(job.modality, path, data, e, 0, True)[0] for e in epochs)
        except UserError:
            continue
        if any(not np.array_equal(first, other) for other in others):
            what = f"{job.modality} is loaded differently in every epoch, and no option says so"
            hint = "Name it in its Modality.random (data/media/modality.py), and turn it off"
            raise UserError(what, field=path, hint=hint)
        return


def finish(plan: Plan, identity: str, base: Mapping[str, str]) -> dict[str, Any] | None:
    """Describes the cache once all shards are there.

    Returns:
      What `features.manifest` reads; None while shards are missing.

    Raises:
      UserError: too many media are bad.
    """
    kinds, judge = {}, Quarantine(None, plan.stage.data.max_bad_share)
    for job in plan.jobs:
        if not all(planning.finished(plan, job, s, identity) for s in range(job.shards)):
            return None
        notes = [json.loads(plan.note(job, s).read_text("utf-8")) for s in range(job.shards)]
        rejects = [Skipped(**reject) for note in notes for reject in note["rejects"]]
        judge.add(len(job.places), rejects, at_end=True)
        reasons = Counter(reject.reason for reject in rejects)
        counted = {"reasons": dict(reasons.most_common()), "rejected": reasons.total()}
        sizes = [note["bytes"] for note in notes]
        kinds[job.modality] = job.about() | counted | {"shards": len(notes), "bytes": sizes}
        _save(plan.output / f"{job.modality}.npy", job.table)
    about = {
        "format": cached_features.FORMAT,
        "stage": plan.stage.name,
        "config": plan.config,
        "modalities": kinds,
        "base": dict(base),
        "sources": describe.sources(plan.stage.data, {n: len(s) for n, s in plan.sources.items()}),
    }
    write_json(plan.output / cached_features.MANIFEST, about)
    for left in plan.output.glob(".*.array_record-*.partial"):  # by writers that were killed
        left.unlink(missing_ok=True)
    return about


def _save(file: Path, table: np.ndarray) -> None:
    partial = file.with_name(f".{file.name}.{secrets.token_hex(8)}.partial")
    with partial.open("wb") as opened:
        np.save(opened, table)
    partial.replace(file)
