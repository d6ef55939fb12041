"""The pipeline: sources become an endless, mixed, exactly resumable stream of batches.

The order of records is a function of (seed, step) alone; hosts share the plan of every global batch
and each fills its own rows. All randomness belongs to records (`Record.generator`), so neither
threads nor resuming nor the number of hosts changes a batch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np

from xllm_jax.core.batch import Batch
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Data
from xllm_jax.data import mixture, reads_in_flight
from xllm_jax.data.batching import batch_format
from xllm_jax.data.batching.batch_format import BatchFormat, BatchPlan
from xllm_jax.data.media import modalities
from xllm_jax.data.media.decode_workers import Decoders
from xllm_jax.data.quarantine import Quarantine
from xllm_jax.data.record import Mode, Record, Skipped

Step = BatchPlan | Sequence[mixture.Drawn]
"""The plan of a batch, in one pass; the records to be planned, in training."""

SILENT = 10  # batches in a row without anything to learn before training gives up


class Pipeline:
    """The data of a stage on one host.

    Args:
      data: sources, mixture and static shapes.
      seed: of the run.
      process_index, process_count: which host this is, of how many.
      train: an endless shuffled stream with augmentation; False is one pass in order without.
      quarantine: file that bad records are appended to; host 1, 2 … appends to its own beside it,
        `NAME.host1.jsonl`.
      limit: records of the one pass; None for all.
      sample: a pass over about so many records instead of all (0: all), by the mixture and
        spread over each source (`stream.sample`). What is too long is cut or left out.

    Raises:
      UserError: an unknown batch format, reader, option, template or mixture entry; a source
        without records; rows that do not divide over the hosts.
    """

    def __init__(
        self,
        data: Data,
        seed: int = 0,
        process_index: int = 0,
        process_count: int = 1,
        train: bool = True,
        quarantine: str | Path | None = None,
        limit: int | None = None,
        sample: int | None = None,
    ):
        self.data, self.seed, self.format = data, seed, batch_format.find(data)
        self.mode = Mode(train, cut=sample is not None)
        self.rows = host_rows(self.format, process_index, process_count)
        self.process_count, self.quarantine = process_count, own_list(quarantine, process_index)
        self.weights = mixture.mixture(data)
        self.activity = reads_in_flight.Activity()
        self.sources = {
            name: self.activity.watched(name, mixture.of_stage(name, data)) for name in self.weights
        }
        self.resources = self.format.resources
        self._load = self.activity.loading(
            Decoders(data).load if data.deadline else modalities.load
        )
        self._steps = self._drawn() if train else self._planned(limit, sample)

    def records(self) -> int:
        """Records of one epoch."""
        return sum(map(len, self.sources.values()))

    def __len__(self) -> int:
        """Batches of one pass; training has no end."""
        return len(self._steps)

    def iterate(self, position: Mapping[str, Any] | None = None) -> Batches:
        """The batches of this host, from the start or from what `Batches.position` returned.

        The number of hosts and, without length buckets, of examples per batch may have changed.

        Raises:
          UserError: the position does not fall between two batches of the present size.
        """
        if position is not None:
            position = {**position, "next_index": self._next_index(position)}
        options = self._ahead()
        filled = iter(self._steps.map(self._attempt).to_iter_dataset(options))
        examples = self.data.examples
        drawn = position["next_index"] * examples if position else 0
        quarantine = Quarantine(self.quarantine, self.data.max_bad_share, drawn)
        records = max(self.records() // self.process_count, 1)  # those that this host meets
        return Batches(filled, quarantine, records, self.mode.train, examples, position)

    def _ahead(self) -> grain.ReadOptions:
        """How many batches are decoded at a time and wait, within `data.waiting` gigabytes."""
        threads, share = self.data.threads, (self.rows.stop - self.rows.start) / self.format.rows
        size = share * sum(
            math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(self.format.shapes())
        )
        most = max(int(self.data.waiting * 1e9 / max(size, 1)), 1)
        # Grain counts the batches being decoded among those that wait.
        waiting = min(2 * threads, most)
        return grain.ReadOptions(num_threads=min(threads, waiting), prefetch_buffer_size=waiting)

    def _next_index(self, position: Mapping[str, Any]) -> int:
        """Number of the batch at a position, which batches of another size may have reached."""
        now, index = self.data.examples, int(position["next_index"])
        before = int(position.get("examples", now))
        bucketed = self.format.bucketed
        if before == now or (not bucketed and index * before % now == 0):
            return index * before // now
        reason = "length buckets are on" if bucketed else f"{index * before} records are behind it"
        raise UserError(
            f"cannot continue a run of {before} examples a batch with {now}: {reason}",
            field="data.examples",
            hint=f"Keep {before}, or start anew from the result of the run",
        )

    def _drawn(self) -> grain.MapDataset:
        """The records of every global batch of the endless stream."""
        examples, buckets = self.data.examples, self._buckets()
        return mixture.batches(self.sources, self.weights, self.seed, examples, buckets)

    def _planned(self, limit: int | None, sample: int | None) -> grain.MapDataset:
        """The plans of one pass."""
        if sample is None:
            drawn = mixture.in_order(self.sources, self.weights, self._buckets())[:limit]
        else:
            drawn = mixture.sample(self.sources, self.weights, sample, len(self.data.frames) - 1)
        records = [record for record in drawn if isinstance(record, Record)]
        plans = self.format.batches(records, self.mode)
        if not plans:
            raise UserError("no record can be used", field="data.sources")
        plans[-1] = _with_skipped(plans[-1], drawn)
        return grain.MapDataset.source(plans)

    def _plan(self, drawn: Sequence[mixture.Drawn]) -> BatchPlan:
        records = [record for record in drawn if isinstance(record, Record)]
        return _with_skipped(self.format.plan(records, self.mode), drawn)

    def _attempt(self, step: Step) -> tuple[Batch, dict[str, Any]] | UserError:
        """One step's batch; a UserError travels as a value, past the notes that grain adds."""
        try:
            return self._fill(step if isinstance(step, BatchPlan) else self._plan(step))
        except UserError as error:
            return error

    def _fill(self, plan: BatchPlan) -> tuple[Batch, dict[str, Any]]:
        """One host's arrays of a plan, and what the run reports about them."""
        batch, unread = self.format.fill(plan, self.rows, self.mode, self._load)
        lost = {skip.key for skip in unread}
        members = [m for m in plan.members(self.rows) if m[2].example.key not in lost]
        everywhere = plan.members(slice(None))
        return batch, {
            "examples": len(everywhere),
            "padding": self.format.padding(batch),
            "keys": [record.example.key for _, _, record in members],
            "sources": [record.source for _, _, record in members],
            "members": [(row, segment, record.example) for row, segment, record in members],
            "planned": [(row, record.example) for row, _, record in everywhere],
            "epoch": max((record.epoch for _, _, record in everywhere), default=0),
            "supervised": plan.supervised(),
            "cut": plan.cut(),
            "skipped": (*plan.skipped, *unread),
            "seen": len(members) + len(unread) + len(plan.skipped),
        }

    def _buckets(self) -> mixture.Buckets | None:
        """Length bucket of every record, read once from the audio files' headers."""
        if not self.format.bucketed:
            return None

        def bucket(record: mixture.Drawn) -> int:
            last = len(self.data.frames) - 1
            known = isinstance(record, Record)
            return self.format.bucket(record.example) if known else last

        found = {}
        with ThreadPoolExecutor(max(self.data.threads, 1)) as pool:
            for name in self.weights:
                drawn = mixture.in_order(self.sources, {name: None})
                found[name] = np.fromiter(pool.map(bucket, drawn), np.int32, len(drawn))
        return found


class Batches:
    """An iterator of (batch, info) that knows where it stands.

    `info` holds: examples (of the global batch), keys, sources and members (row, segment, Example;
    of this host's rows), planned (row, Example; of all hosts' rows, whether its files could be
    read or not), padding ({what: (used, capacity)} of this host's rows), epoch, supervised
    (tokens, globally), cut (tokens of long text), skipped (records left out, with reasons), bad
    (records that could not be read so far).
    """

    def __init__(
        self,
        filled: grain.DatasetIterator[tuple[Batch, dict[str, Any]] | UserError],
        quarantine: Quarantine,
        records: int,
        train: bool,
        examples: int,
        position: Mapping[str, Any] | None,
    ):
        self._examples = examples
        self._filled, self.quarantine = filled, quarantine
        self._records, self._train, self._silent = records, train, 0
        self._drawn = 0  # examples of the stream before the next batch
        if position is not None:
            self._drawn = int(position["next_index"]) * examples
            self._filled.set_state({"next_index": int(position["next_index"])})
            self.quarantine.restore(position)
            self._silent = int(position["silent"])

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> tuple[Batch, dict[str, Any]]:
        try:
            made = next(self._filled)
        except StopIteration:
            self.quarantine.add(0, (), at_end=True)
            raise
        if isinstance(made, UserError):
            raise made
        batch, info = made
        before = self.quarantine.seen // self._records
        seen = info.pop("seen")
        at_end = (self.quarantine.seen + seen) // self._records > before
        self.quarantine.add(seen, info["skipped"], at_end, self._drawn)
        self._drawn += self._examples
        self._check_supervised(info["supervised"], info["skipped"])
        return batch, info | {"bad": self.quarantine.bad}

    def position(self) -> dict[str, int]:
        """Where the next batch is, as small JSON; the same on every host but for the counts."""
        state = self.quarantine.state() | {"silent": self._silent, "examples": self._examples}
        return state | {"next_index": int(self._filled.get_state()["next_index"])}

    def _check_supervised(self, supervised: int, skipped: Sequence[Skipped]) -> None:
        self._silent = 0 if supervised else self._silent + 1
        if self._train and self._silent >= SILENT:
            last = skipped[-1] if skipped else None
            told = f", the last record without a place is {last.key}: {last.reason}" if last else ""
            raise UserError(
                f"{SILENT} batches in a row have nothing to learn{told}",
                field="data",
                hint="Look at the answers of the sources and at data.answers",
            )


def host_rows(form: BatchFormat, process_index: int, process_count: int) -> slice:
    """Which rows of every global batch this host fills.

    Args:
      form: the batch format.
      process_index, process_count: which host, of how many.

    Raises:
      UserError: the rows do not divide over the hosts.
    """
    if form.rows % process_count:
        what = f"{form.rows} do not divide over {process_count} hosts"
        raise UserError(what, field=f"data.{form.rows_field}")
    each = form.rows // process_count
    return slice(process_index * each, (process_index + 1) * each)


def own_list(quarantine: str | Path | None, process_index: int) -> Path | None:
    """The quarantine file of one host: hosts that share a folder must not share a file."""
    if quarantine is None or not process_index:
        return Path(quarantine) if quarantine else None
    path = Path(quarantine)
    return path.with_name(f"{path.stem}.host{process_index}{path.suffix}")


def _with_skipped(plan: BatchPlan, drawn: Sequence[mixture.Drawn]) -> BatchPlan:
    unread = tuple(record for record in drawn if isinstance(record, Skipped))
    return dataclasses.replace(plan, skipped=(*plan.skipped, *unread))
