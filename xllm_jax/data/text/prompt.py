"""The prompt: an Example becomes token ids, media slots and the GLM layout of one sequence.

A prompt is a list of segments: text, or a slot that interface outputs fill. Slots stand where
`<image>`, `<video>`, `<speech>` markers in the text say, or first, in the order of the example's
media; any number of them, in any order. Each slot is wrapped in its tags, `<Image>` … `</Image>`,
which are plain text tokenized on their own (paper section 3.3; repository `xllm.py: prompt_wrap`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence

import numpy as np

from xllm_jax.core.errors import UserError
from xllm_jax.data.example import Example
from xllm_jax.data.record import DoesNotFit
from xllm_jax.data.text import blank_infilling
from xllm_jax.data.text.glm_layout import positions_of
from xllm_jax.data.text.instructions import instructions

WRITTEN = "text:"  # prefix of media that are written out instead of shown
PLACEHOLDER = 0  # token id under a media embedding; the model ignores it


@dataclasses.dataclass(frozen=True)
class Template:
    """The words around a question.

    Attributes:
      question: the only round of a prompt; `{question}` stands for the question.
      earlier: one earlier round, with `{round}`, `{question}` and `{answer}`.
      last: the round to be answered, after earlier ones.
    """

    question: str
    earlier: str
    last: str


TEMPLATES = {
    # paper, appendix A.3
    "paper": Template(
        question="Question: {question} \n Answer:",
        earlier="Question: {question} \n Answer: {answer}\n",
        last="Question: {question} \n Answer:",
    ),
    # repository, xllm.py; the form ChatGLM was tuned on
    "chatglm_zh": Template(
        question="问：{question}\n答：",
        earlier="[Round {round}]\n问：{question}\n答：{answer}\n",
        last="[Round {round}]\n问：{question}\n答：",
    ),
    # the question as it is
    "plain": Template(question="{question}", earlier="{question}\n{answer}\n", last="{question}"),
}


@dataclasses.dataclass(frozen=True)
class Text:
    """Words of the prompt; `cut` says whether a long prompt may lose them."""

    text: str
    cut: bool = True


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
class Prompt:
    """One sequence in GLM's layout: prompt [gMASK] <sop> answer <eop>.

    T tokens, A supervised tokens (0 without an answer).

    Attributes:
      ids: `[T]` int32.
      positions: `[T, 2]` int32, position and block position.
      context: `[T]` bool, up to and including [gMASK].
      index: {modality: `[T]` int32}, -1 or the flat position in the example's interface outputs.
      answer_index: `[A]` int32; the first is [gMASK], whose logits predict <sop>.
      targets: `[A]` int32, <sop>, the answer, <eop>.
      weights: `[A]` float32.
      slots: the slots in order.
      cut: how many tokens of the prompt and of the answer were left out.
    """

    ids: np.ndarray
    positions: np.ndarray
    context: np.ndarray
    index: dict[str, np.ndarray]
    answer_index: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    slots: tuple[Slot, ...]
    cut: tuple[int, int] = (0, 0)


@dataclasses.dataclass(frozen=True)
class Limits:
    """Static sizes that a prompt must fit.

    Attributes:
      length: tokens in all.
      answers: supervised tokens, <sop> and <eop> included.
      prompt: prompt tokens without slots, tags and written media, [gMASK] included; None leaves
        only `length`.
      strict: a prompt that is too long is an error instead of being cut.
    """

    length: int
    answers: int
    prompt: int | None = None
    strict: bool = False


def template(name: str) -> Template:
    """The named template.

    Raises:
      UserError: unknown name.
    """
    if name not in TEMPLATES:
        raise UserError(
            f"unknown template {name!r}",
            field="data.template",
            hint=f"Choices: {', '.join(TEMPLATES)}",
        )
    return TEMPLATES[name]


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
    if not example.history:
        return style.question.format(question=asked)
    rounds = [
        style.earlier.format(round=number, question=earlier, answer=answer)
        for number, (earlier, answer) in enumerate(example.history)
    ]
    return "".join(rounds) + style.last.format(round=len(rounds), question=asked)


def segments(
    media: Sequence[tuple[str, str]], text: str, slot: Callable[[str, str], Slot]
) -> list[Text | Slot]:
    """Puts media where the text's markers say, and the others first, each inside its tags.

    Args:
      media: (modality, path) pairs, or ('text:modality', written description).
      text: the prompt with `<modality>` markers; the n-th marker of a modality stands for its n-th
        file. A marker of a modality that the example does not have is plain text.
      slot: (modality, path) -> Slot.

    Raises:
      UserError: more markers than files of a modality.
    """
    waiting = [(name.removeprefix(WRITTEN), name, path) for name, path in media]
    names = sorted({short for short, _, _ in waiting})
    pieces = re.split(f"<({'|'.join(map(re.escape, names))})>", text) if names else [text]
    placed: list[Text | Slot] = [Text(pieces[0])]
    for short, after in zip(pieces[1::2], pieces[2::2]):
        found = next((entry for entry in waiting if entry[0] == short), None)
        if found is None:
            raise UserError(f"the text has more <{short}> markers than {short} files")
        waiting.remove(found)
        placed += [*_wrapped(found, slot), Text(after)]
    leading = [segment for entry in waiting for segment in _wrapped(entry, slot)]
    return [s for s in leading + placed if isinstance(s, Slot) or s.text]


def _wrapped(
    entry: tuple[str, str, str], slot: Callable[[str, str], Slot]
) -> tuple[Text | Slot, ...]:
    short, name, path = entry
    inner = Text(path, cut=False) if name.startswith(WRITTEN) else slot(short, path)
    return Text(f"<{short.capitalize()}>", False), inner, Text(f"</{short.capitalize()}>", False)


def build(
    example: Example,
    tokenizer,
    style: Template,
    slot: Callable[[str, str], Slot],
    limits: Limits,
    generator: np.random.Generator,
    answer: bool = True,
) -> Prompt:
    """Turns an example into one sequence.

    Long text is cut as the reference cuts it: the prompt's last tokens go, then the answer's, and
    <eop> is still trained after a cut answer. Slots, tags and written media are never cut.

    Args:
      example: what to ask and to answer.
      tokenizer: `encode(text)` without special tokens, and `specials` (glm_layout.Specials).
      style: the template.
      slot: (modality, path) -> Slot; sizes the slots.
      limits: static sizes.
      generator: draws the instruction where the example has none.
      answer: False ends the sequence at <sop>, ready to generate.

    Raises:
      DoesNotFit: slots and answer alone are too long, or the prompt is and `limits.strict`.
      UserError: the example cannot be a prompt, or has nothing to answer.
    """
    parts = segments(example.media, words(example, question(example, generator), style), slot)
    encoded = [
        [PLACEHOLDER] * (part.items * part.size)
        if isinstance(part, Slot)
        else list(tokenizer.encode(part.text))
        for part in parts
    ]
    reply, lost = [], 0
    if answer:
        if not example.answer.strip():
            raise UserError("has no answer to learn", field=example.key)
        whole = list(tokenizer.encode(example.answer))
        reply = whole[: max(limits.answers - 2, 0)]
        lost = len(whole) - len(reply)
    supervised = len(reply) + 2 if answer else 1
    kept, dropped = _shorten(parts, encoded, limits, supervised, example.key)
    return _layout(parts, kept, reply if answer else None, tokenizer, (dropped, lost))


def infilled(example: Example, tokenizer, limits: Limits, generator: np.random.Generator) -> Prompt:
    """Turns an example's answer into a row of GLM's pre-training: spans to be filled in.

    A text that is longer than a row gives a random window of itself.

    Raises:
      UserError: fewer than two tokens.
    """
    ids = list(tokenizer.encode(example.answer))
    # Short spans cover 15 % of the text; each adds its mask, <sop> and <eop> at worst.
    most = max(min(int(limits.length / 1.5) - 3, limits.answers - 2), 2)
    start = int(generator.integers(max(len(ids) - most, 0) + 1))
    row = blank_infilling.example(ids[start : start + most], tokenizer.specials, generator)
    return Prompt(
        ids=row.ids,
        positions=row.positions,
        context=row.context,
        index={},
        answer_index=row.answer_index,
        targets=row.targets,
        weights=np.ones(len(row.targets), np.float32),
        slots=(),
        cut=(0, max(len(ids) - most, 0)),
    )


def _shorten(
    parts: Sequence[Text | Slot],
    encoded: list[list[int]],
    limits: Limits,
    supervised: int,
    key: str,
) -> tuple[list[list[int]], int]:
    """Cuts the text from its end until the prompt fits; returns the parts and the tokens cut."""
    free = [isinstance(part, Text) and part.cut for part in parts]
    fixed = sum(len(ids) for ids, cut in zip(encoded, free) if not cut)
    total = sum(len(ids) for ids, cut in zip(encoded, free) if cut)
    room = limits.length - fixed - supervised - 1  # one for [gMASK]
    if limits.prompt is not None:
        room = min(room, limits.prompt - 1)
    if room < 0 or (limits.strict and total > room):
        raise DoesNotFit(
            f"takes {fixed + total + supervised + 1} tokens, its bucket holds {limits.length}",
            field=key,
            hint="Raise data.length, or shorten the text or the media",
        )
    kept = []
    left = room
    for ids, cut in zip(encoded, free):
        kept.append(ids[:left] if cut else ids)
        left -= len(kept[-1]) if cut else 0
    return kept, max(total - room, 0)


def _layout(
    parts: Sequence[Text | Slot],
    encoded: Sequence[Sequence[int]],
    reply: Sequence[int] | None,
    tokenizer,
    cut: tuple[int, int],
) -> Prompt:
    """Joins the parts and adds GLM's special tokens, positions, context and targets."""
    specials = tokenizer.specials
    context = [token for ids in encoded for token in ids] + [specials.gmask]
    tail = [specials.sop] + ([*reply, specials.eop] if reply is not None else [])
    ids = np.asarray(context + tail, np.int32)
    count, mask = len(ids), len(context) - 1
    supervised = len(tail) if reply is not None else 0
    return Prompt(
        ids=ids,
        positions=positions_of(mask + 1, count, mask),
        context=np.arange(count) <= mask,
        index=_index(parts, encoded, count),
        answer_index=(mask + np.arange(supervised)).astype(np.int32),
        targets=np.asarray(tail[:supervised], np.int32),
        weights=np.ones(supervised, np.float32),
        slots=tuple(part for part in parts if isinstance(part, Slot)),
        cut=cut,
    )


def _index(
    parts: Sequence[Text | Slot], encoded: Sequence[Sequence[int]], count: int
) -> dict[str, np.ndarray]:
    """{modality: `[count]` flat positions in the example's interface outputs, -1 elsewhere}."""
    index: dict[str, np.ndarray] = {}
    items: dict[str, int] = {}
    start = 0
    for part, ids in zip(parts, encoded):
        if isinstance(part, Slot):
            row = index.setdefault(part.modality, np.full(count, -1, np.int32))
            row[start : start + len(ids)] = part.index(items.get(part.modality, 0))
            items[part.modality] = items.get(part.modality, 0) + part.items
        start += len(ids)
    return index
