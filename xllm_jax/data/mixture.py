"""The order of records: sources, their mixture, and length buckets. Random access by step."""

from __future__ import annotations

import inspect
import math
import os
import zlib
from collections.abc import Mapping, Sequence
from typing import cast

import grain
import numpy as np

from xllm_jax.core import lookup
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Data, Source
from xllm_jax.data import guarded
from xllm_jax.data.example import Example
from xllm_jax.data.media import reach
from xllm_jax.data.record import Record, Skipped
from xllm_jax.data.rows.translated import Untranslated

READERS = "xllm_jax.data.sources"
ENDLESS = 2**50  # records; grain's own endless length overflows when batches hold one record

Sources = Mapping[str, Sequence[Example]]
Buckets = Mapping[str, np.ndarray]  # {source: bucket of each record}
Drawn = Record | Skipped  # Skipped where the reader could not make the example


class First(Sequence):
    """A share of the examples of a source, the first ones; one of them at least."""

    def __init__(self, examples: Sequence[Example], share: float):
        self._examples = examples
        self._count = max(math.ceil(share * len(examples)), min(1, len(examples)))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < self._count:
            raise IndexError(index)
        return self._examples[index]


def read(
    name: str,
    source: Source,
    root: str,
    within: reach.Reach | None = None,
    modalities: Mapping[str, str] | None = None,
) -> Sequence[Example]:
    """Opens one source with its reader.

    Args:
      name: of the source.
      source: reader, path, split and options.
      root: folder that its path starts from, or ''.
      within: what it may read; None is what `reach.of` says.
      modalities: further ones that the stage names (`Data.modalities`).

    Raises:
      UserError: unknown reader or option, no files, no records or none that can be read; of the
        sequence, a record that cannot be read, and nothing else.
    """
    field = f"data.sources.{name}"
    reader = lookup.module(READERS, source.reader, f"{field}.reader")
    known = list(inspect.signature(reader.examples).parameters)[2:]
    confined = "within" in known
    known = [option for option in known if option != "within"]
    unknown = sorted(set(source.options) - set(known))
    if unknown:
        raise UserError(
            f"{source.reader} has no option {unknown[0]!r}",
            field=f"{field}.options",
            hint=f"Choices: {', '.join(known) or 'none'}",
        )
    path = os.path.join(root, source.path)
    places = {**(modalities or {}), **(source.options.get("modalities") or {})}

    def examples() -> Sequence[Example]:
        allowed = within or reach_of(source, root)
        allowed.check(path)
        allowed.check_links(path)
        passed = {"within": allowed, "modalities": places} if confined else {}
        with allowed.holding():
            found = reader.examples(path, source.split, **{**source.options, **passed})
            inside = reach.Confined(found, allowed)
            return inside if source.share == 1 else First(inside, source.share)

    return guarded.opened(examples, field, path)


def of_stage(name: str, data: Data) -> Sequence[Example]:
    """Opens a source that a stage names, see `read`."""
    return read(name, data.sources[name], data.root, modalities=data.modalities)


def reach_of(source: Source, root: str) -> reach.Reach:
    """What a source may read; its reader says which folders next to it belong to the layout."""
    reader = lookup.module(READERS, source.reader, "reader")
    return reach.of(source, root, getattr(reader, "BESIDE", ()))


def mixture(data: Data) -> dict[str, float | None]:
    """Weight of every source that takes part; None means by its size.

    Raises:
      UserError: no source left, or weights that do not name exactly the sources.
    """
    if not any(data.mix.values()) and data.mix.keys() <= data.sources.keys():
        left = data.sources.keys() - data.mix.keys()
        weights: dict[str, float | None] = dict.fromkeys(n for n in data.sources if n in left)
    else:
        odd = sorted(data.mix.keys() ^ data.sources.keys())
        if odd:
            raise UserError(
                f"{odd[0]!r} is not in both data.mix and data.sources",
                field="data.mix",
                hint="Give every source a weight; 0 leaves it out",
            )
        weights = {name: weight for name, weight in data.mix.items() if weight}
    if not weights:
        raise UserError("no source takes part", field="data.mix")
    if any(weight is not None and weight < 0 for weight in weights.values()):
        raise UserError("a weight is negative", field="data.mix")
    return weights


def draw(sources: Sources, name: str, epoch: int, index: int, seed: int, bucket: int) -> Drawn:
    """The record at one place of one source."""
    try:
        return Record(guarded.example(sources[name], index), name, epoch, index, seed, bucket)
    except UserError as error:
        bad = not isinstance(error, Untranslated)
        return Skipped(f"{name}[{index}]", error.what, bad, error.field)


def batches(
    sources: Sources,
    weights: Mapping[str, float | None],
    seed: int,
    examples: int,
    buckets: Buckets | None = None,
) -> grain.MapDataset:
    """Endless global batches: element n is the tuple of records of batch n.

    Every source is shuffled anew in each of its epochs and the mixture interleaves them evenly.
    With buckets, a batch holds records of one bucket, and buckets come as often as their records.

    Args:
      sources: {name: examples}.
      weights: {name: relative number of examples, or None for its size}.
      seed: of the run.
      examples: records per batch.
      buckets: bucket of every record.
    """
    numbers = {int(b) for name in weights for b in np.unique(buckets[name])} if buckets else {0}
    parts, shares = [], []
    for bucket in sorted(numbers):
        mixed, share = _bucket(sources, weights, seed, bucket, buckets)
        parts.append(mixed.batch(examples, batch_fn=tuple))
        shares.append(share)
    return grain.MapDataset.mix(parts, shares) if len(parts) > 1 else parts[0]


def _bucket(
    sources: Sources,
    weights: Mapping[str, float | None],
    seed: int,
    bucket: int,
    buckets: Buckets | None,
) -> tuple[grain.MapDataset, float]:
    """The endless records of one bucket, and its share of the whole mixture."""
    parts, shares = [], []
    for name, weight in weights.items():
        size = len(sources[name])
        places = np.flatnonzero(buckets[name] == bucket) if buckets else range(size)
        if len(places):
            chosen = cast(Sequence[int], places)  # an array will do
            parts.append(_shuffled(sources, name, chosen, seed, bucket))
            shares.append((size if weight is None else weight) * len(places) / size)
    mixed = grain.MapDataset.mix(parts, shares) if len(parts) > 1 else parts[0]
    return mixed, sum(shares)


def _shuffled(
    sources: Sources, name: str, places: Sequence[int], seed: int, bucket: int
) -> grain.MapDataset:
    """Some places of one source, over and over, in a new order each epoch."""
    order = zlib.crc32(f"{seed} {name} {bucket}".encode())

    def record(position: int, place: int) -> Drawn:
        return draw(sources, name, position // len(places), int(place), seed, bucket)

    order_of_places = grain.MapDataset.source(places).shuffle(seed=order)
    return order_of_places.repeat(ENDLESS // len(places)).map_with_index(record)


def sample(
    sources: Sources, weights: Mapping[str, float | None], count: int, bucket: int = 0
) -> list[Drawn]:
    """About `count` records, each once and always the same: spread evenly over every source.

    Sources share the number by their weights and are mixed evenly; one that has fewer records gives
    all it has.

    Args:
      sources, weights: as in `batches`.
      count: records in all; 0 takes every record.
      bucket: length bucket that they all take.
    """
    shares = {n: len(sources[n]) if weight is None else weight for n, weight in weights.items()}
    placed = []
    for name, share in shares.items():
        size = len(sources[name])
        most = min(size, max(1, round(count * share / sum(shares.values())))) if count else size
        placed += [((i + 0.5) / most, name, i * size // most) for i in range(most)]
    placed.sort(key=lambda entry: entry[0])
    return [draw(sources, name, 0, index, 0, bucket) for _, name, index in placed]


def in_order(
    sources: Sources, weights: Mapping[str, float | None], buckets: Buckets | None = None
) -> list[Drawn]:
    """Every record once, source by source, in the reader's order."""
    return [
        draw(sources, name, 0, index, 0, int(buckets[name][index]) if buckets else 0)
        for name in weights
        for index in range(len(sources[name]))
    ]
