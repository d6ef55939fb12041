"""Writing a cache: media are decoded ahead, computed on all devices, and kept shard by shard.

Hosts need share nothing but the folder: each takes its shards, whole or not at all, and the one
that ends last describes the cache. So a host that is lost costs its shard under way, and the same
command continues. Hosts that JAX has joined compare what they are about to write, and wait for
each other.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

from xllm_jax.assembly import parameters
from xllm_jax.assembly.system import System
from xllm_jax.core import atomic, bounded, checksum, hosts, mesh
from xllm_jax.core.errors import UserError
from xllm_jax.core.parallel import overlapped
from xllm_jax.core.progress import Bar
from xllm_jax.core.sharded_job import Shards
from xllm_jax.data import cached_features
from xllm_jax.data.media import captions, modalities
from xllm_jax.data.media.decode_workers import Decoders
from xllm_jax.data.quarantine import Quarantine
from xllm_jax.data.record import DoesNotFit, Skipped
from xllm_jax.data.text.clip_tokenizer import ClipTokenizer
from xllm_jax.feature_cache import cache_plan, describe
from xllm_jax.feature_cache.cache_plan import FeatureCachePlan, Job

OPTIONS = "group_size:1,uncompressed"  # of the ArrayRecord writer
LOOKED_AT = 100  # media among which one can be read
EPOCHS = 8  # looked at for randomness

Media = tuple[np.ndarray, np.ndarray, int]  # values, lengths, embeddings wanted
Compute = Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[jax.Array, jax.Array]]


class Rejected(NamedTuple):
    """A medium that cannot be used: what the cache holds in its row, and why."""

    content: bytes
    reason: Skipped


def run(
    plan: FeatureCachePlan,
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
    base = checksum.of_tree(params, cache_plan.begun_older(plan) and not again)
    hosts.meet(store, "planned")  # reading the sources takes one longer than another
    hosts.agree(store, "cache", cache_plan.items(plan, base))
    identity = hosts.share(store, "cache", lambda: cache_plan.begin(plan, base, again))
    name = f"quarantine-{host}.jsonl" if count > 1 else "quarantine.jsonl"
    quarantine = Quarantine(plan.output / name, plan.stage.data.max_bad_share)
    load = Decoders(plan.stage.data).load if plan.stage.data.deadline else modalities.load
    load = _with_captions(plan, load)
    for job in plan.jobs:
        shards = plan.shards(job, identity)
        mine = range(host, shards.count, count)
        todo = shards.todo(mine)
        _note_rejects(shards, sorted(set(mine) - set(todo)), quarantine)
        if todo:
            steady(plan, job, load)
            compute = computation(plan, job, device_mesh, params)
            total = shards.rows_in(mine)
            done = total - shards.rows_in(todo)
            with Bar(total=total, initial=done, desc=job.modality, unit="items") as bar:
                read = functools.partial(_read, plan, job, load)
                _write(plan, job, shards, todo, read, compute, batch, quarantine, bar)
    hosts.meet(store, "written")
    return hosts.share(store, "description", lambda: finish(plan, identity, base))


def _with_captions(plan: FeatureCachePlan, otherwise: modalities.Load) -> modalities.Load:
    """What reads captions with one tokenizer for all of them, and files as `otherwise` does."""
    data, encoders = plan.stage.data, plan.xllm.encoders
    if not any(job.modality in encoders for job in plan.jobs):
        return otherwise
    tokenizer = ClipTokenizer(data.caption_tokenizer)

    def load(modality: str, path: str, *more: object) -> tuple[np.ndarray, np.ndarray]:
        if modality not in encoders:
            return otherwise(modality, path, *more)
        return captions.ids(tokenizer, path, data), np.ones(1, np.int32)

    return load


def _note_rejects(shards: Shards, finished: Sequence[int], quarantine: Quarantine) -> None:
    """Lists what earlier starts of the command have found wrong."""
    for shard in finished:
        note = bounded.read_json(shards.note(shard))
        quarantine.add(len(shards.rows(shard)), [Skipped(**one) for one in note["rejects"]])


def computing(plan: FeatureCachePlan, device_mesh: Any) -> dict[str, Any]:
    """What the jobs compute with, a copy on every device; nothing else is loaded."""
    steps = [step for job in plan.jobs for step in plan.xllm.chain(job.modality)[: job.steps]]
    system = System(plan.stage, plan.xllm, device_mesh)
    only = [path for path in system.shapes if any(step.owns(path) for step in steps)]
    return parameters.parameters(system, only)


def computation(
    plan: FeatureCachePlan, job: Job, device_mesh: Any, params: Mapping[str, Any]
) -> Compute:
    """(values `[R * items, ...]`, lengths and counts `[R * items]`) to what the steps give."""
    compiled = jax.jit(functools.partial(cache_plan.outcome, plan.xllm, job.modality, job.steps))
    sharding = NamedSharding(device_mesh, mesh.batch_spec())

    def compute(*arrays: np.ndarray) -> tuple[jax.Array, jax.Array]:
        with jax.set_mesh(device_mesh):
            return compiled(params, *(jax.device_put(array, sharding) for array in arrays))

    return compute


def _write(
    plan: FeatureCachePlan,
    job: Job,
    shards: Shards,
    todo: Sequence[int],
    read: Callable[[int], Media | Rejected],
    compute: Compute,
    batch: int,
    quarantine: Quarantine,
    bar: Bar,
) -> None:
    found, data = modalities.find(job.modality, plan.stage.data), plan.stage.data
    capacity = (mesh.rounded_up(batch), found.items(data), *found.shape(data))
    threads = max(data.threads, 1)
    for shard, media in shards.read(todo, read, threads, 2 * capacity[0]):
        shards.write(shard, _records(media, compute, capacity, quarantine, bar), OPTIONS)


def _read(plan: FeatureCachePlan, job: Job, load: modalities.Load, row: int) -> Media | Rejected:
    path, record = plan.medium(job, row)
    data = plan.stage.data
    try:
        values, lengths = load(job.modality, path, data, record, 0, True)
        return values, lengths, cached_features.wanted(job.modality, record, data)
    except UserError as error:
        bad = not isinstance(error, DoesNotFit)
        skipped = Skipped(record.example.key, error.what, bad, str(error.field))
        return Rejected(cached_features.rejected(error), skipped)


def _records(
    decoded: Iterable[Media | Rejected],
    compute: Compute,
    capacity: tuple[int, ...],
    quarantine: Quarantine,
    bar: Bar,
) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """(what the cache holds of a medium, what is wrong with it or None), in order.

    Args:
      decoded: media of a shard.
      compute: the steps.
      capacity: shape of the values of a batch, `(media, items, ...)`.
      quarantine: gets the bad media before the shard is complete; too many raise an error.
      bar: counts media.
    """
    rejects, total = [], 0
    start = lambda entries: compute(*_stacked(entries, capacity))  # noqa: E731
    for entries, made in overlapped(decoded, capacity[0], start):
        values, lengths = (np.asarray(array) for array in made)
        values, lengths = (x.reshape(-1, capacity[1], *x.shape[1:]) for x in (values, lengths))
        for row, entry in enumerate(entries):
            if isinstance(entry, Rejected):
                rejects.append(entry.reason)
                yield entry.content, dataclasses.asdict(entry.reason)
            else:
                yield cached_features.packed(values[row], lengths[row]), None
            bar.update(1)
        total += len(entries)
    quarantine.add(total, rejects)


def _stacked(
    entries: Sequence[Media | Rejected], capacity: tuple[int, ...]
) -> tuple[np.ndarray, ...]:
    """One batch; rows of bad media and behind the end are empty."""
    values = np.zeros(capacity, np.float32)
    lengths, counts = np.zeros((2, *capacity[:2]), np.int32)
    for row, entry in enumerate(entries):
        if not isinstance(entry, Rejected):
            values[row], lengths[row], counts[row] = entry
    return values.reshape(-1, *capacity[2:]), lengths.reshape(-1), counts.reshape(-1)


def steady(plan: FeatureCachePlan, job: Job, load: modalities.Load) -> None:
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


def finish(plan: FeatureCachePlan, identity: str, base: Mapping[str, str]) -> dict[str, Any] | None:
    """Describes the cache once all shards are there.

    Returns:
      What `features.manifest` reads; None while shards are missing.

    Raises:
      UserError: too many media are bad.
    """
    kinds, judge = {}, Quarantine(None, plan.stage.data.max_bad_share)
    for job in plan.jobs:
        shards = plan.shards(job, identity)
        if shards.todo():
            return None
        notes = shards.notes()
        rejects = [Skipped(**reject) for note in notes for reject in note["rejects"]]
        judge.add(len(job.places), rejects, at_end=True)
        reasons = Counter(reject.reason for reject in rejects)
        counted = {"reasons": dict(reasons.most_common()), "rejected": reasons.total()}
        sizes = [note["bytes"] for note in notes]
        kinds[job.modality] = job.about() | counted | {"shards": len(notes), "bytes": sizes}
        atomic.write_array(plan.output / f"{job.modality}.npy", job.table)
    about = {
        "format": cached_features.FORMAT,
        "stage": plan.stage.name,
        "config": plan.config,
        "modalities": kinds,
        "base": dict(base),
        "sources": describe.sources(plan.stage.data, {n: len(s) for n, s in plan.sources.items()}),
    }
    atomic.write_json(plan.output / cached_features.MANIFEST, about)
    for job in plan.jobs:
        plan.shards(job).remove_partial()
    return about
