"""The prompt: an Example becomes token ids and media slots, laid out as the LLM's family does.

A prompt is a list of segments: text, or a slot that interface outputs fill. Slots stand where
`<image>`, `<video>`, `<speech>` markers in the text say, or first, in the order of the example's
media; any number of them, in any order. Each slot is wrapped in its tags, `<Image>` … `</Image>`,
which are plain text tokenized on their own (paper section 3.3; repository `xllm.py: prompt_wrap`).
"""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Callable, Sequence

import numpy as np

from xllm_jax.core.errors import UserError
from xllm_jax.core.media_names import SPELLED, WRITTEN, is_written
from xllm_jax.data.example import Example
from xllm_jax.data.record import DoesNotFit
from xllm_jax.data.text import signal_runs
from xllm_jax.data.text.instructions import instructions
from xllm_jax.data.text.llm_family import LLMFamily
from xllm_jax.data.text.templates import Template
from xllm_jax.data.text.token_rows import Row

MEDIA = "\x00"  # in a prompt's text, the place of files that no marker places
PLACEHOLDER = 0  # token id under a media embedding; the model ignores it


@dataclasses.dataclass(frozen=True)
class Text:
    """Words of the prompt.

    Attributes:
      text: they.
      cut: whether a long prompt may lose them.
      spelled: whether every character is a token.
    """

    text: str
    cut: bool = True
    spelled: bool = False


@dataclasses.dataclass(frozen=True)
class Slot:
    """A place for the embeddings of one file.

    Attributes:
      modality: whose interface fills it.
      path: the file.
      items: media items that the file becomes (frames of a video, else 1).
      size: embeddings of each item in the prompt.
      stride: embeddings of each item in the interface's output, at least `size`.
    """

    modality: str
    path: str
    items: int
    size: int
    stride: int

    def index(self, first: int) -> np.ndarray:
        """`[items * size]` flat positions in the outputs when `first` items come before."""
        start = (first + np.arange(self.items)) * self.stride
        return (start[:, None] + np.arange(self.size)).reshape(-1)


@dataclasses.dataclass(frozen=True)
class Prompt(Row):
    """One sequence with its media slots.

    Attributes:
      index: {modality: `[T]` int32}, -1 or the flat position in the example's interface outputs.
      slots: the slots in order.
      cut: how many tokens of the prompt and of the answer were left out.
      runs: of signal tokens in the answer, in order.
    """

    index: dict[str, np.ndarray]
    slots: tuple[Slot, ...]
    cut: tuple[int, int] = (0, 0)
    runs: tuple[signal_runs.Run, ...] = ()


@dataclasses.dataclass(frozen=True)
class Limits:
    """Static sizes that a prompt must fit.

    Attributes:
      length: tokens in all.
      answers: supervised tokens, those that the family adds included.
      strict: a prompt that is too long is an error instead of being cut.
    """

    length: int
    answers: int
    strict: bool = False


def question(example: Example, generator: np.random.Generator) -> str:
    """The example's instruction, or one drawn from its task's named instructions.

    Raises:
      UserError: neither exists.
    """
    if example.instruction:
        return example.instruction
    known = instructions(example.task)
    if not known:
        raise UserError(
            f"no instruction, and the task {example.task!r} has none of its own",
            field=example.key,
            hint="Give the example an instruction or add the task to data/text/instructions.py",
        )
    return known[int(generator.integers(len(known)))]


def words(example: Example, asked: str, style: Template) -> str:
    """The prompt's text with markers still in it; earlier rounds first."""
    rounds = [
        style.earlier.format(round=number, question=earlier, answer=answer)
        for number, (earlier, answer) in enumerate(example.history)
    ]
    last = (style.last if rounds else style.question).format(
        round=len(rounds), question=asked, media=MEDIA
    )
    return "".join([style.system, *rounds, last])


def segments(
    media: Sequence[tuple[str, str]], text: str, slot: Callable[[str, str], Slot]
) -> list[Text | Slot]:
    """Puts media where the text's markers say, and the others first, each inside its tags.

    Args:
      media: (modality, path) pairs, or ('text:modality', written description), or the same with
        'spelled:'.
      text: the prompt with `<modality>` markers; the n-th marker of a modality stands for its n-th
        file. A marker of a modality that the example does not have is plain text.
      slot: (modality, path) -> Slot.

    Raises:
      UserError: more markers than files of a modality.
    """
    waiting = [(plain_name(name), name, path) for name, path in media]
    names = sorted({short for short, _, _ in waiting})
    markers = "|".join(map(re.escape, names)) or "(?!)"  # which matches nothing
    pieces = re.split(f"<({markers})>|({MEDIA})", text)
    placed: list[Text | Slot] = [Text(pieces[0])]
    rest = 0  # where the others go
    for short, mark, after in zip(pieces[1::3], pieces[2::3], pieces[3::3]):
        if mark:
            rest = len(placed)
        else:
            found = next((entry for entry in waiting if entry[0] == short), None)
            if found is None:
                raise UserError(f"the text has more <{short}> markers than {short} files")
            waiting.remove(found)
            placed += _wrapped(found, slot)
        placed.append(Text(after))
    placed[rest:rest] = [segment for entry in waiting for segment in _wrapped(entry, slot)]
    return _joined([s for s in placed if isinstance(s, Slot) or s.text])


def _joined(parts: Sequence[Text | Slot]) -> list[Text | Slot]:
    """Neighboring words as one text, which a tokenizer reads at once."""
    made: list[Text | Slot] = []
    for part in parts:
        last = made[-1] if made else None
        if isinstance(part, Text) and isinstance(last, Text) and part.cut and last.cut:
            made[-1] = Text(last.text + part.text)
        else:
            made.append(part)
    return made


def plain_name(name: str) -> str:
    """The modality that a medium stands for, written or not."""
    return name.removeprefix(WRITTEN).removeprefix(SPELLED)


def _wrapped(
    entry: tuple[str, str, str], slot: Callable[[str, str], Slot]
) -> tuple[Text | Slot, ...]:
    short, name, path = entry
    inner = Text(path, False, name.startswith(SPELLED)) if is_written(name) else slot(short, path)
    return Text(f"<{short.capitalize()}>", False), inner, Text(f"</{short.capitalize()}>", False)


def build(
    example: Example,
    family: LLMFamily,
    style: Template,
    slot: Callable[[str, str], Slot],
    limits: Limits,
    generator: np.random.Generator,
    answer: bool = True,
    signals: signal_runs.Registry = types.MappingProxyType({}),
) -> Prompt:
    """Turns an example into one sequence.

    Long text is cut as the reference cuts it: the prompt's last tokens go, then the answer's, and
    the end is still trained after a cut answer. Slots, tags, written media and runs of signal
    tokens are never cut.

    Args:
      example: what to ask and to answer.
      family: of the LLM.
      style: the template.
      slot: (modality, path) -> Slot; sizes the slots.
      limits: static sizes.
      generator: draws the instruction where the example has none.
      answer: False leaves the sequence open, ready to generate.
      signals: {modality: its signal tokens} of answers that are more than text.

    Raises:
      DoesNotFit: slots and answer alone are too long, or the prompt is and `limits.strict`, or the
        answer would lose signal tokens.
      UserError: the example cannot be a prompt, or has nothing to answer.
    """
    parts = segments(example.media, words(example, question(example, generator), style), slot)
    encoded = [
        [PLACEHOLDER] * (part.items * part.size) if isinstance(part, Slot) else _ids(part, family)
        for part in parts
    ]
    frame = family.row((), () if answer else None)  # what the family adds
    reply, lost = None, 0
    if answer:
        if not (example.answer.strip() or example.outputs):
            raise UserError("has no answer to learn", field=example.key)
        whole = signal_runs.encode(example, family, signals)
        reply = whole[: max(limits.answers - len(frame.targets), 0)]
        lost = len(whole) - len(reply)
    others = len(frame.ids) + len(reply or ())
    kept, dropped = _shorten(parts, encoded, limits, others, example.key)
    row = family.row([token for ids in kept for token in ids], reply)
    index = _index(parts, kept, row)
    slots = tuple(part for part in parts if isinstance(part, Slot))
    runs = signal_runs.located(example, row.ids, signals) if answer else ()
    return Prompt(**vars(row), index=index, slots=slots, cut=(dropped, lost), runs=runs)


def _ids(part: Text, family: LLMFamily) -> list[int]:
    encode = family.tokenizer.encode
    # The last one: pieces that only begin a text may stand before it.
    return [encode(sign)[-1] for sign in part.text] if part.spelled else encode(part.text)


def text_only(
    example: Example, family: LLMFamily, limits: Limits, generator: np.random.Generator
) -> Prompt:
    """Turns an example's answer into a row of the family's text-only training.

    A text that is longer than a row gives a random window of itself.

    Raises:
      UserError: the text is too short.
    """
    ids = family.tokenizer.encode(example.answer)
    most = family.text_capacity(limits.length, limits.answers)
    start = int(generator.integers(max(len(ids) - most, 0) + 1))
    row = family.text_row(ids[start : start + most], generator)
    return Prompt(**vars(row), index={}, slots=(), cut=(0, max(len(ids) - most, 0)))


def _shorten(
    parts: Sequence[Text | Slot], encoded: list[list[int]], limits: Limits, others: int, key: str
) -> tuple[list[list[int]], int]:
    """Cuts the text from its end until the prompt fits beside `others` tokens.

    Returns:
      (ids of each part, tokens that were cut).
    """
    free = [isinstance(part, Text) and part.cut for part in parts]
    fixed = sum(len(ids) for ids, cut in zip(encoded, free) if not cut)
    total = sum(len(ids) for ids, cut in zip(encoded, free) if cut)
    capacity = limits.length - fixed - others
    if capacity < 0 or (limits.strict and total > capacity):
        raise DoesNotFit(
            f"takes {fixed + total + others} tokens, its bucket holds {limits.length}",
            field=key,
            hint="Raise data.length, or shorten the text or the media",
        )
    kept: list[list[int]] = []
    left = capacity
    for ids, cut in zip(encoded, free):
        kept.append(ids[:left] if cut else ids)
        left -= len(kept[-1]) if cut else 0
    return kept, max(total - capacity, 0)


def _index(
    parts: Sequence[Text | Slot], encoded: Sequence[Sequence[int]], row: Row
) -> dict[str, np.ndarray]:
    """{modality: `[T]` flat positions in the example's interface outputs, -1 elsewhere}."""
    index: dict[str, np.ndarray] = {}
    items: dict[str, int] = {}
    start = row.start
    for part, ids in zip(parts, encoded):
        if isinstance(part, Slot):
            places = index.setdefault(part.modality, np.full(len(row.ids), -1, np.int32))
            places[start : start + len(ids)] = part.index(items.get(part.modality, 0))
            items[part.modality] = items.get(part.modality, 0) + part.items
        start += len(ids)
    return index
