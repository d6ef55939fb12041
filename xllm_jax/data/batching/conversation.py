"""The conversation format: examples become prompts, prompts become packed rows of one batch.

Rows are planned before any file is opened, so the global batch does not depend on the number of
hosts, and nobody decodes a file that no row has room for.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from jax.typing import DTypeLike

from xllm_jax.core.batch import ConversationBatch, zeros
from xllm_jax.core.errors import UserError
from xllm_jax.core.media_names import captions_of
from xllm_jax.core.stage import Data
from xllm_jax.data.batching import packing
from xllm_jax.data.batching.batch_format import BatchFormat, BatchPlan, Entry
from xllm_jax.data.cached_features import Features
from xllm_jax.data.example import Example
from xllm_jax.data.media import modalities, target_pictures
from xllm_jax.data.record import PROMPT, DoesNotFit, Mode, Record, Skipped
from xllm_jax.data.text import llm_family, prompt, signal_runs, templates, token_rows
from xllm_jax.data.text.clip_tokenizer import ClipTokenizer


@dataclasses.dataclass(frozen=True)
class Resources:
    """What planning needs besides the data's settings."""

    family: llm_family.LLMFamily
    style: templates.Template
    features: Features | None = None
    captions: ClipTokenizer | None = None


@dataclasses.dataclass(frozen=True)
class Placed(Entry):
    """One example of a row, with its sequence."""

    prompt: prompt.Prompt

    @property
    def supervised(self) -> int:
        """Supervised tokens of the sequence."""
        return len(self.prompt.targets)

    @property
    def cut(self) -> int:
        """Tokens that its long text has lost."""
        return sum(self.prompt.cut)


class Format(BatchFormat[Placed, ConversationBatch, Resources]):
    """Conversations in packed rows."""

    packs = caches = True

    def load_resources(self) -> Resources:
        """Loads the tokenizer and the template that the data names.

        Raises:
          UserError: no such tokenizer or template, or a modality without a size.
        """
        data = self.data
        for modality in data.items:
            if modality not in data.embeddings:
                raise UserError(
                    f"does not say how many embeddings an item of {modality!r} takes",
                    field="data.embeddings",
                )
            modalities.find(modality, data)
        family = llm_family.load(data)
        signal_runs.check(data.signals, family)
        captions = _caption_tokenizer(data) if data.signals else None
        return Resources(
            family, templates.template_of(data.template, family), self.features, captions
        )

    @functools.cached_property
    def features(self) -> Features | None:
        """The cache that holds features instead of media."""
        return Features(self.data.cache) if self.data.cache else None

    @property
    def row_tokens(self) -> int:
        """Tokens of a row."""
        return self.data.length

    @property
    def bucketed(self) -> bool:
        """Whether batches differ in the length of their speech."""
        return len(self.data.frames) > 1 and modalities.bucketed(self.data)

    def bucket(self, example: Example) -> int:
        """Length bucket of an example by its speech files' headers; the first without any."""
        return modalities.bucket(example, self.data, 0)

    def zeros(self, rows: int, bucket: int = -1) -> ConversationBatch:
        """An empty batch, see `BatchFormat.zeros`."""
        data = self._at(bucket)

        def item(name: str) -> tuple[tuple[int, ...], DTypeLike]:
            known = self.features and self.features.item(name)
            return known or (modalities.find(name, data).shape(data), np.float32)

        media = {name: (items, *item(name)) for name, items in data.items.items()}
        axes = len(llm_family.find(data).position_step)
        signals = {
            name: (one.runs, data.caption_length, one.pixels) for name, one in data.signals.items()
        }
        held = {name: self.features and self.features.item(captions_of(name)) for name in signals}
        targets = {name: item for name, item in held.items() if item}
        return zeros(rows, data.length, data.answers, axes, media, signals, targets)

    def _at(self, bucket: int) -> Data:
        """The settings with one length bucket alone."""
        return dataclasses.replace(self.data, frames=(self.data.frames[bucket],))

    def plan(self, records: Sequence[Record], mode: Mode) -> BatchPlan[Placed]:
        """Builds the prompts of a global batch and packs them into its rows.

        Raises:
          DoesNotFit: outside training, a prompt is longer than a row.
        """
        prompts, skipped = self.prepare(records, mode)
        places = packing.pack(list(map(needs, prompts)), capacity(self.data), self.rows)
        rows: list[list[Placed]] = [[] for _ in range(self.rows)]
        for placed, place in zip(prompts, places):
            if place is None:
                skipped.append(_without_room(placed))
            else:
                rows[place].append(placed)
        return BatchPlan(tuple(map(tuple, rows)), tuple(skipped), _longest(prompts))

    def prepare(self, records: Sequence[Record], mode: Mode) -> tuple[list[Placed], list[Skipped]]:
        """Prompts of the records in order, and the records that cannot be prompts."""
        placed, skipped = [], []
        for record in records:
            key = record.example.key
            try:
                example = modalities.rename_cif_media(record.example, self.data)
                record = dataclasses.replace(record, example=example)
                placed.append(Placed(record, self.sequence(record, mode)))
            except DoesNotFit as error:
                if mode.strict:
                    raise
                skipped.append(Skipped(key, error.what))
            except UserError as error:
                skipped.append(Skipped(key, str(error), bad=True))
        return placed, skipped

    def limits(self, mode: Mode) -> prompt.Limits:
        """How long a prompt may be."""
        return prompt.Limits(self.data.length, self.data.answers, strict=mode.strict)

    def sequence(self, record: Record, mode: Mode) -> prompt.Prompt:
        """The prompt of one record."""
        example, data = record.example, self.data

        def slot(modality: str, path: str) -> prompt.Slot:
            found = modalities.find(modality, data)
            if modality not in data.items:
                raise DoesNotFit(f"data.items gives {modality!r} no place", field=example.key)
            size = modalities.slot_size(modality, path, example, data)
            return prompt.Slot(modality, path, found.items(data), size, data.embeddings[modality])

        return prompt.build(
            example,
            self.resources.family,
            self.resources.style,
            slot,
            self.limits(mode),
            record.generator(PROMPT),
            signals=data.signals,
        )

    def batches(self, records: Sequence[Record], mode: Mode) -> list[BatchPlan[Placed]]:
        """Plans that hold every record exactly once, in order: a batch ends when the next does not
        fit.

        Raises:
          DoesNotFit: a prompt that no row can hold, where `mode` does not leave it out.
        """
        prompts, skipped = self.prepare(records, mode)
        if not mode.strict:
            prompts, large = self._fitting(prompts)
            skipped += large
        plans: list[BatchPlan[Placed]] = []
        while prompts:
            plan, count = self._first_rows(prompts[: self.data.examples])
            plans.append(plan)
            prompts = prompts[count:]
        return [*plans[:-1], *(dataclasses.replace(p, skipped=tuple(skipped)) for p in plans[-1:])]

    def _first_rows(self, window: Sequence[Placed]) -> tuple[BatchPlan[Placed], int]:
        """The rows of the first prompts that fit into one batch, and how many those are."""
        limits = capacity(self.data)
        places = packing.first_fit(list(map(needs, window)), limits, self.rows)
        end = places.index(None) if None in places else len(places)
        if not end:
            raise DoesNotFit(
                f"takes {needs(window[0])}, a row has {limits}",
                field=window[0].record.example.key,
                hint="Raise data.length, data.answers or data.items",
            )
        window = window[:end]
        rows = [[p for p, at in zip(window, places) if at == r] for r in range(self.rows)]
        return BatchPlan(tuple(map(tuple, rows)), bucket=_longest(window)), end

    def _fitting(self, prompts: Sequence[Placed]) -> tuple[list[Placed], list[Skipped]]:
        """Those that an empty row has room for, and the others."""
        limits = capacity(self.data)
        alone = [packing.first_fit([needs(placed)], limits, 1) == [0] for placed in prompts]
        large = [_without_room(placed) for placed, fits in zip(prompts, alone) if not fits]
        return [placed for placed, fits in zip(prompts, alone) if fits], large

    def fill(
        self,
        plan: BatchPlan[Placed],
        rows: slice,
        mode: Mode,
        load: modalities.Load = modalities.load,
    ) -> tuple[ConversationBatch, list[Skipped]]:
        """Opens the media of some rows and writes their arrays, see `BatchFormat.fill`.

        A row goes on without an example whose files cannot be read.
        """
        features = self.resources.features
        load = features.loader(load) if features else load
        mine, fits = plan.rows[rows], self._at(plan.bucket)
        batch = self.zeros(len(mine), plan.bucket)
        skipped: list[Skipped] = []
        for number, row in enumerate(mine):
            used = dict.fromkeys(capacity(self.data), 0)
            for segment, placed in enumerate(row, start=1):
                try:
                    loaded = [
                        load(slot.modality, slot.path, fits, placed.record, part, mode.train)
                        for part, slot in enumerate(placed.prompt.slots)
                    ]
                    shown = self._shown(placed, fits, load)
                    targets = self._targets(placed)
                except UserError as error:
                    too_long = isinstance(error, DoesNotFit)
                    if too_long and mode.strict:
                        raise
                    key = placed.record.example.key
                    skipped.append(Skipped(key, error.what, bad=not too_long, file=error.field))
                    continue
                self._write_runs(batch, number, placed, shown, targets, used)
                _write(batch, number, segment, placed, loaded, used)
        return batch, skipped

    def _shown(self, placed: Placed, fits: Data, load: modalities.Load) -> list[np.ndarray | None]:
        """The picture of every run, `[side, side, 3]` uint8, where there is one to be opened."""
        made: list[np.ndarray | None] = []
        for run in placed.prompt.runs:
            opened = run.picture and fits.signals[run.modality].pixels
            name = target_pictures.name_of(run.modality)
            loaded = load(name, run.picture, fits, placed.record, 0, False) if opened else None
            made.append(loaded[0][0] if loaded else None)
        return made

    def _targets(self, placed: Placed) -> list[np.ndarray | None]:
        """What a cache holds of every run's caption, `[q, width]`; None without a cache of them."""
        features, data = self.resources.features, self.data
        return [
            features.target(run.modality, run.caption, data) if features else None
            for run in placed.prompt.runs
        ]

    def _write_runs(
        self,
        batch: ConversationBatch,
        row: int,
        placed: Placed,
        shown: Sequence[np.ndarray | None],
        targets: Sequence[np.ndarray | None],
        used: dict[str, int],
    ) -> None:
        """Writes where an example's signal tokens stand, and what they stand for."""
        for run, picture, target in zip(placed.prompt.runs, shown, targets):
            assert self.resources.captions is not None, "loaded where there are signal tokens"
            table, place = batch.signals[run.modality], used[runs_of(run.modality)]
            table.start[row, place] = used["tokens"] + run.start
            table.captions[row, place] = self.resources.captions.encode(
                [run.caption], self.data.caption_length
            )
            table.weights[row, place] = 1.0
            if picture is not None:
                assert table.pictures is not None and table.shown is not None, "`zeros` makes them"
                table.pictures[row, place], table.shown[row, place] = picture, 1.0
            if target is not None:
                assert table.targets is not None, "`zeros` makes them"
                table.targets[row, place] = target
            used[runs_of(run.modality)] += 1

    def padding(self, batch: ConversationBatch) -> dict[str, tuple[int, int]]:
        """{kind of place: (used, capacity)}: tokens, places of answers, and of each modality its
        items or, where they differ in length, their steps."""
        found = {
            "tokens": (int((batch.segments > 0).sum()), batch.segments.size),
            "answers": (int((batch.weights > 0).sum()), batch.weights.size),
        }
        for name, entry in batch.media.items():
            steps = entry.values.shape[2] if entry.values.ndim == 4 else 1
            found[name] = (int(entry.lengths.sum()), entry.lengths.size * steps)
        for name, table in batch.signals.items():
            found[runs_of(name)] = (int(table.weights.sum()), table.weights.size)
        return found


def _caption_tokenizer(data: Data) -> ClipTokenizer:
    if not data.caption_tokenizer:
        hint = "Give the folder of the text encoder's tokenizer"
        raise UserError("names none", field="data.caption_tokenizer", hint=hint)
    return ClipTokenizer(data.caption_tokenizer)


def _longest(prompts: Sequence[Placed]) -> int:
    """The last bucket that any example belongs to; -1 without examples."""
    return max((placed.record.bucket for placed in prompts), default=-1)


def _without_room(placed: Placed) -> Skipped:
    return Skipped(placed.record.example.key, f"no room for {needs(placed)}")


def needs(placed: Placed) -> packing.Need:
    """What an example takes of a row: tokens, supervised tokens, media items, signal runs."""
    made = placed.prompt
    taken = {"tokens": len(made.ids), "answers": len(made.targets)}
    for slot in made.slots:
        taken[slot.modality] = taken.get(slot.modality, 0) + slot.items
    for run in made.runs:
        taken[runs_of(run.modality)] = taken.get(runs_of(run.modality), 0) + 1
    return taken


def runs_of(modality: str) -> str:
    """How the places for a modality's runs of signal tokens are called."""
    return f"{modality} runs"


def capacity(data: Data) -> packing.Need:
    """What a row has of each."""
    runs = {runs_of(name): one.runs for name, one in data.signals.items()}
    return {"tokens": data.length, "answers": data.answers, **data.items, **runs}


def _write(
    batch: ConversationBatch,
    row: int,
    segment: int,
    placed: Placed,
    loaded: Sequence[tuple[np.ndarray, np.ndarray]],
    used: dict[str, int],
) -> None:
    """Writes one example behind what `used` says is taken, and moves that on."""
    made, start = placed.prompt, used["tokens"]
    tokens = slice(start, start + len(made.ids))
    token_rows.write(batch, row, segment, made, start, used["answers"])
    for modality, index in made.index.items():
        stride = next(slot.stride for slot in made.slots if slot.modality == modality)
        shifted = np.where(index >= 0, index + used[modality] * stride, -1)
        batch.media[modality].index[row, tokens] = shifted
    for slot, (values, lengths) in zip(made.slots, loaded):
        items = slice(used[slot.modality], used[slot.modality] + slot.items)
        entry = batch.media[slot.modality]
        assert entry.counts is not None, "`zeros` makes them"
        entry.values[row, items] = values
        entry.lengths[row, items] = lengths
        entry.counts[row, items] = slot.size
        used[slot.modality] += slot.items
    used["tokens"], used["answers"] = tokens.stop, used["answers"] + len(made.targets)
