"""The conversation form: examples become prompts, prompts become packed rows of one Batch.

Planning reads text only and is the same on every host: it decides for the whole global batch which
example stands in which row. Filling opens the media of one host's rows. So the global batch does
not depend on the number of hosts, and nobody decodes a file that no row has room for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from xllm_jax.core.batch import Batch, zeros
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Data
from xllm_jax.data.cached_features import Features
from xllm_jax.data.example import Example
from xllm_jax.data.media import modalities
from xllm_jax.data.record import PROMPT, DoesNotFit, Mode, Record, Skipped
from xllm_jax.data.text import prompt
from xllm_jax.data.text.chatglm_tokenizer import ChatGLMTokenizer


@dataclasses.dataclass(frozen=True)
class Tools:
    """What planning needs besides the data's settings."""

    tokenizer: ChatGLMTokenizer
    style: prompt.Template
    features: Features | None = None


@dataclasses.dataclass(frozen=True)
class Placed:
    """One example of a row, with its sequence."""

    record: Record
    prompt: prompt.Prompt


Rows = tuple[tuple[Placed, ...], ...]
Need = dict[str, int]  # amount of each limited thing


@dataclasses.dataclass(frozen=True)
class Plan:
    """Rows of a global batch, what was left out, and how many tokens were cut from long text.

    `bucket` is the length bucket of its longest speech; -1 is the last.
    """

    rows: Rows
    skipped: tuple[Skipped, ...]
    cut: int = 0
    bucket: int = -1

    def supervised(self) -> int:
        """Supervised tokens of the plan."""
        return sum(int(placed.prompt.weights.sum()) for row in self.rows for placed in row)

    def members(self, rows: slice) -> list[tuple[int, int, Record]]:
        """(row, segment, record) of every example in some rows, rows counted from the first."""
        return [
            (number, segment, placed.record)
            for number, row in enumerate(self.rows[rows])
            for segment, placed in enumerate(row, start=1)
        ]


def tools(data: Data) -> Tools:
    """Loads the tokenizer and the template that the data names.

    Raises:
      UserError: no such tokenizer or template, or a modality without a size.
    """
    for modality in data.items:
        if modality not in data.embeddings:
            raise UserError(
                f"does not say how many embeddings an item of {modality!r} takes",
                field="data.embeddings",
            )
        modalities.find(modality, data)
    cached = Features(data.cache) if data.cache else None
    return Tools(ChatGLMTokenizer(data.tokenizer), prompt.template(data.template), cached)


def bucket(example: Example, data: Data) -> int:
    """Length bucket of an example by the headers of its speech files; the first without any."""
    return modalities.bucket(example, data, 0)


def plan(records: Sequence[Record], kit: Tools, data: Data, mode: Mode) -> Plan:
    """Builds the prompts of a global batch and packs them into its rows.

    Raises:
      DoesNotFit: outside training, a prompt is longer than a row.
    """
    prompts, skipped = prepare(records, kit, data, mode)
    places = pack([needs(placed) for placed in prompts], capacity(data), data.rows)
    rows: list[list[Placed]] = [[] for _ in range(data.rows)]
    for placed, place in zip(prompts, places):
        if place is None:
            skipped.append(Skipped(placed.record.example.key, f"no room for {needs(placed)}"))
        else:
            rows[place].append(placed)
    cut = sum(sum(placed.prompt.cut) for row in rows for placed in row)
    return Plan(tuple(map(tuple, rows)), tuple(skipped), cut, _longest(prompts))


def _longest(prompts: Sequence[Placed]) -> int:
    """The last bucket that any example belongs to; -1 without examples."""
    return max((placed.record.bucket for placed in prompts), default=-1)


def prepare(
    records: Sequence[Record], kit: Tools, data: Data, mode: Mode
) -> tuple[list[Placed], list[Skipped]]:
    """Prompts of the records in order, and the records that cannot be prompts."""
    placed, skipped = [], []
    for record in records:
        key = record.example.key
        try:
            record = dataclasses.replace(
                record, example=modalities.rename_cif_media(record.example, data)
            )
            placed.append(Placed(record, sequence(record, kit, data, mode)))
        except DoesNotFit as error:
            if mode.strict:
                raise
            skipped.append(Skipped(key, error.what))
        except UserError as error:
            skipped.append(Skipped(key, str(error), bad=True))
    return placed, skipped


def sequence(record: Record, kit: Tools, data: Data, mode: Mode) -> prompt.Prompt:
    """The prompt of one record."""
    example = record.example
    limits = prompt.Limits(data.length, data.answers, strict=mode.strict)
    plain = not (example.instruction or example.media or example.history)
    if data.form == "text" and example.task == "text" and plain:
        return prompt.infilled(example, kit.tokenizer, limits, record.generator(PROMPT))

    def slot(modality: str, path: str) -> prompt.Slot:
        found = modalities.find(modality, data)
        if modality not in data.items:
            raise DoesNotFit(f"data.items gives {modality!r} no place", field=example.key)
        size, stride = (
            modalities.slot_size(modality, path, example, data),
            data.embeddings[modality],
        )
        return prompt.Slot(modality, path, found.items(data), size, stride)

    return prompt.build(
        example,
        kit.tokenizer,
        kit.style,
        slot,
        limits,
        record.generator(PROMPT),
    )


def needs(placed: Placed) -> Need:
    """What an example takes of a row: tokens, supervised tokens, media items."""
    made = placed.prompt
    taken = {"tokens": len(made.ids), "answers": len(made.targets)}
    for slot in made.slots:
        taken[slot.modality] = taken.get(slot.modality, 0) + slot.items
    return taken


def capacity(data: Data) -> Need:
    """What a row has of each."""
    return {"tokens": data.length, "answers": data.answers, **data.items}


def pack(wanted: Sequence[Need], room: Need, rows: int) -> list[int | None]:
    """Row of each entry, or None: of several packings the first that leaves the fewest out.

    First fit in order fills rows to the brim. Even rows, the longest entries first, are better
    where the number of items per row is what is scarce, and balanced ones where supervised tokens
    are scarce too.
    """
    ways = (first_fit, even_fit, balanced_fit)
    best: list[int | None] = [None] * len(wanted)
    for way in ways:
        found = way(wanted, room, rows)
        if found.count(None) < best.count(None):
            best = found
        if None not in best:
            break
    return best


def first_fit(wanted: Sequence[Need], room: Need, rows: int) -> list[int | None]:
    """Row of each entry: the first with room for all it needs, or None.

    Deterministic, in the order given. A need that `room` does not name has no room.
    """
    return _placed(wanted, room, rows, range(len(wanted)))


def even_fit(wanted: Sequence[Need], room: Need, rows: int) -> list[int | None]:
    """Row of each entry, those with most tokens first: the one with the fewest tokens yet."""
    order = sorted(range(len(wanted)), key=lambda entry: -wanted[entry]["tokens"])
    return _placed(wanted, room, rows, order, lambda row, need: -row["tokens"])


def balanced_fit(wanted: Sequence[Need], room: Need, rows: int) -> list[int | None]:
    """Row of each entry, the largest first by tokens and supervised tokens together: the one that
    it fills least, by whichever of both is scarcer there."""
    scarce = [name for name in ("tokens", "answers") if room.get(name)]

    def size(entry: int) -> float:
        return -sum(wanted[entry].get(name, 0) / room[name] for name in scarce)

    def filled(row: Need, need: Need) -> float:
        return max((need.get(name, 0) - row[name]) / room[name] for name in scarce)

    return _placed(wanted, room, rows, sorted(range(len(wanted)), key=size), filled)


def _placed(
    wanted: Sequence[Need],
    room: Need,
    rows: int,
    order: Iterable[int],
    worse: Callable[[Need, Need], float] | None = None,
) -> list[int | None]:
    """Row of each entry, taken in `order`: the first that fits, where `worse` is least."""
    free = [dict(room) for _ in range(rows)]
    places: list[int | None] = [None] * len(wanted)
    for entry in order:
        need = wanted[entry]
        fits = (
            number
            for number, row in enumerate(free)
            if all(row.get(name, 0) >= amount for name, amount in need.items())
        )
        if worse:
            place = min(fits, key=lambda number: worse(free[number], need), default=None)
        else:
            place = next(fits, None)
        places[entry] = place
        for name, amount in need.items() if place is not None else ():
            free[place][name] -= amount
    return places


def batches(records: Sequence[Record], kit: Tools, data: Data, mode: Mode) -> list[Plan]:
    """Plans that hold every record exactly once, in order: a batch ends when the next does not fit.

    Raises:
      DoesNotFit: a prompt that no row can hold, where `mode` does not leave it out.
    """
    prompts, skipped = prepare(records, kit, data, mode)
    room = capacity(data)
    if not mode.strict:
        prompts, large = _fitting(prompts, room)
        skipped += large
    plans: list[Plan] = []
    start = 0
    while start < len(prompts):
        window = prompts[start : start + data.examples]
        places = first_fit([needs(placed) for placed in window], room, data.rows)
        end = places.index(None) if None in places else len(places)
        if not end:
            raise DoesNotFit(
                f"takes {needs(window[0])}, a row has {room}",
                field=window[0].record.example.key,
                hint="Raise data.length, data.answers or data.items",
            )
        rows = [[p for p, at in zip(window[:end], places) if at == r] for r in range(data.rows)]
        cut = sum(sum(placed.prompt.cut) for placed in window[:end])
        plans.append(Plan(tuple(map(tuple, rows)), (), cut, _longest(window[:end])))
        start += end
    return [*plans[:-1], *(dataclasses.replace(p, skipped=tuple(skipped)) for p in plans[-1:])]


def _fitting(prompts: Sequence[Placed], room: Need) -> tuple[list[Placed], list[Skipped]]:
    """Those that an empty row has room for, and the others."""
    alone = [first_fit([needs(placed)], room, 1) == [0] for placed in prompts]
    large = [
        Skipped(placed.record.example.key, f"no room for {needs(placed)}")
        for placed, fits in zip(prompts, alone)
        if not fits
    ]
    return [placed for placed, fits in zip(prompts, alone) if fits], large


def shapes(data: Data, features: Features | None) -> dict[str, tuple[Any, ...]]:
    """{modality: (items per row, shape of an item, dtype)} of the batches."""

    def item(name: str) -> tuple[Any, ...]:
        known = features and features.item(name)
        return known or (modalities.find(name, data).shape(data), np.float32)

    return {name: (items, *item(name)) for name, items in data.items.items()}


def fill(
    made: Plan,
    rows: slice,
    kit: Tools,
    data: Data,
    mode: Mode,
    load: modalities.Load = modalities.load,
) -> tuple[Batch, list[Skipped]]:
    """Opens the media of one host's rows and writes its arrays.

    Returns:
      (Batch with the B rows of this host, the examples whose files could not be read; their rows
      go on without them).
    """
    load = kit.features.loader(load) if kit.features else load
    fits = dataclasses.replace(data, frames=(data.frames[made.bucket],))
    mine = made.rows[rows]
    batch = zeros(len(mine), data.length, data.answers, shapes(fits, kit.features))
    skipped: list[Skipped] = []
    for number, row in enumerate(mine):
        used = dict.fromkeys(["tokens", "answers", *data.items], 0)
        for segment, placed in enumerate(row, start=1):
            try:
                loaded = [
                    load(slot.modality, slot.path, fits, placed.record, part, mode.train)
                    for part, slot in enumerate(placed.prompt.slots)
                ]
            except UserError as error:
                too_long = isinstance(error, DoesNotFit)
                if too_long and mode.strict:
                    raise
                key = placed.record.example.key
                skipped.append(Skipped(key, error.what, bad=not too_long, file=error.field))
                continue
            _write(batch, number, segment, placed, loaded, used)
    return batch, skipped


def _write(
    batch: Batch,
    row: int,
    segment: int,
    placed: Placed,
    loaded: Sequence[tuple[np.ndarray, np.ndarray]],
    used: dict[str, int],
) -> None:
    """Writes one example behind what `used` says is taken, and moves that on."""
    made = placed.prompt
    start, answer = used["tokens"], used["answers"]
    tokens = slice(start, start + len(made.ids))
    supervised = slice(answer, answer + len(made.targets))
    batch.ids[row, tokens] = made.ids
    batch.positions[row, tokens] = made.positions
    batch.context[row, tokens] = made.context
    batch.segments[row, tokens] = segment
    batch.answer_index[row, supervised] = made.answer_index + start
    batch.targets[row, supervised] = made.targets
    batch.weights[row, supervised] = made.weights
    for modality, index in made.index.items():
        stride = next(slot.stride for slot in made.slots if slot.modality == modality)
        shifted = np.where(index >= 0, index + used[modality] * stride, -1)
        batch.media[modality].index[row, tokens] = shifted
    for slot, (values, lengths) in zip(made.slots, loaded):
        items = slice(used[slot.modality], used[slot.modality] + slot.items)
        batch.media[slot.modality].values[row, items] = values
        batch.media[slot.modality].lengths[row, items] = lengths
        batch.media[slot.modality].counts[row, items] = slot.size
        used[slot.modality] += slot.items
    used["tokens"], used["answers"] = tokens.stop, supervised.stop


def padding(batch: Batch) -> dict[str, tuple[int, int]]:
    """{what: (used, room)} of a batch: tokens, places of answers, and of each modality its items
    or, where they differ in length, their steps."""
    found = {
        "tokens": (int((batch.segments > 0).sum()), batch.segments.size),
        "answers": (int((batch.weights > 0).sum()), batch.weights.size),
    }
    for name, entry in batch.media.items():
        steps = entry.values.shape[2] if entry.values.ndim == 4 else 1
        found[name] = (int(entry.lengths.sum()), entry.lengths.size * steps)
    return found
