"""Answers with signal tokens: text pieces and runs, whose ids never pass the tokenizer."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

import numpy as np

from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Signals
from xllm_jax.data.example import Example
from xllm_jax.data.record import DoesNotFit
from xllm_jax.data.text.llm_family import LLMFamily

Registry = Mapping[str, Signals]


@dataclasses.dataclass(frozen=True)
class Run:
    """A run of signal tokens in a sequence.

    Attributes:
      modality: what it stands for.
      start: index of its first token.
      caption: what is to be drawn.
      picture: file that shows it, or ''.
    """

    modality: str
    start: int
    caption: str
    picture: str = ""


def pieces(example: Example) -> list[tuple[str, str]]:
    """The answer in order: ('', text) and (modality, caption); empty texts are left out.

    Raises:
      UserError: more markers than outputs of a modality.
    """
    waiting = list(example.outputs)
    names = sorted({name for name, _ in waiting})
    markers = f"<({'|'.join(map(re.escape, names))})>"
    parts = re.split(markers, example.answer) if names else [example.answer]
    made = [("", parts[0])]
    for name, after in zip(parts[1::2], parts[2::2]):
        found = next((one for one in waiting if one[0] == name), None)
        if found is None:
            what = f"the answer has more <{name}> markers than outputs"
            raise UserError(what, field=example.key)
        waiting.remove(found)
        made += [found, ("", after)]
    return [(name, text) for name, text in (*made, *waiting) if name or text.strip()]


def encode(example: Example, family: LLMFamily, registry: Registry) -> list[int]:
    """Ids of an answer.

    Raises:
      DoesNotFit: it holds a modality that the registry lacks.
      UserError: markers without outputs.
    """
    ids: list[int] = []
    for name, text in pieces(example):
        if not name:
            ids += family.tokenizer.encode(text)
        elif name in registry:
            ids += registry[name].ids
        else:
            raise DoesNotFit(f"data.signals gives {name!r} no tokens", field=example.key)
    return ids


def located(example: Example, ids: np.ndarray, registry: Registry) -> tuple[Run, ...]:
    """The runs of an example in its sequence `[T]`, each of them whole.

    Raises:
      DoesNotFit: the sequence has lost a run, or a part of one.
    """
    found = []
    for name in dict.fromkeys(name for name, _ in example.outputs):
        first, count = registry[name].first, registry[name].count
        wanted = [
            (caption, picture)
            for (other, caption), picture in zip(example.outputs, _pictures(example))
            if other == name
        ]
        starts = np.flatnonzero(ids == first).tolist()
        if int(((ids >= first) & (ids < first + count)).sum()) != len(wanted) * count:
            what = f"its answer is cut before the end of its <{name}> signal tokens"
            raise DoesNotFit(what, field=example.key, hint="Raise data.answers or data.length")
        found += [Run(name, start, *shown) for start, shown in zip(starts, wanted)]
    return tuple(sorted(found, key=lambda run: run.start))


def _pictures(example: Example) -> tuple[str, ...]:
    """The files of the outputs, one for each.

    Raises:
      UserError: another number of them.
    """
    if not example.pictures:
        return ("",) * len(example.outputs)
    if len(example.pictures) != len(example.outputs):
        what = f"has {len(example.pictures)} pictures for {len(example.outputs)} outputs"
        raise UserError(what, field=example.key, hint="One for each, '' where there is none")
    return example.pictures


def check(registry: Registry, family: LLMFamily) -> None:
    """Looks whether the LLM's tokenizer leaves the ids of the signal tokens alone.

    Raises:
      UserError: names the modality whose ids are not spare.
    """
    for name, one in registry.items():
        ids = range(one.first, one.first + one.count)
        if ids[0] not in family.spare or ids[-1] not in family.spare:
            spare = family.spare
            what = f"{ids[0]} to {ids[-1]} are not spare ids of the LLM"
            hint = f"Spare are {spare.start} to {spare.stop - 1}" if spare else "It has none"
            raise UserError(what, field=f"data.signals.{name}.first", hint=hint)
        if one.between in family.spare or one.between in ids:
            what, hint = f"{one.between} is no word of the LLM", "Or -1, for none"
            raise UserError(what, field=f"data.signals.{name}.between", hint=hint)


def split(tokens: Sequence[int], registry: Registry) -> list[tuple[str, tuple[int, ...]]]:
    """Generated tokens in order: ('', ids of text) and (modality, places of a run's tokens).

    Args:
      tokens: of one answer; its runs are whole.
      registry: of the signal tokens.
    """
    of = {one.first + n: name for name, one in registry.items() for n in range(one.count)}
    made: list[tuple[str, list[int]]] = []
    place = 0
    while place < len(tokens):
        name = of.get(tokens[place], "")
        if name:
            length = len(registry[name].ids)
            made.append((name, list(range(place, place + length))))
            place += length
        else:
            if not made or made[-1][0]:
                made.append(("", []))
            made[-1][1].append(tokens[place])
            place += 1
    return [(name, tuple(ids)) for name, ids in made]
