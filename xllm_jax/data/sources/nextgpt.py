"""NExT-GPT's conversations whose answers hold pictures, sounds or clips.

    PATH/SPLIT.json (or PATH is the file), a list of records in one of these forms
      T-T+X, first version   {"mm_name", "source_data", "conversation": [
                               {"from": "human", "value", "input_modality": "text"},
                               {"from": "gpt", "value", "caption", "output_modality": "image"}, …]}
      generation, second     {"output_image", "image_captions", "conversations": [
                               {"from": "human", "value": "Can you draw …"},
                               {"from": "gpt", "value": "Sure thing! <image>"}]}

From github.com/NExT-GPT/NExT-GPT (files of the set T2M); the media are their owners' and are not
read: what is learnt is the captions' embeddings. Rounds whose human turn shows a file are left out,
as no file of theirs is released.
"""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from xllm_jax.core.errors import UserError
from xllm_jax.data.example import Example
from xllm_jax.data.rows.lazy import Lazy, Rows
from xllm_jax.data.sources import layout

TEXT, KINDS = "text", ("image", "video", "audio")
MARKER = re.compile(f"<({'|'.join(KINDS)})>")
REMOVED = re.compile(r'["()*#:;~]')  # of captions, by the published code
Round = tuple[str, str, tuple[tuple[str, str], ...]]  # question, answer, outputs


def examples(
    path: str, split: str = "train", modality: str = "", cleaned: bool = True
) -> Sequence[Example]:
    """One example per answer, earlier rounds as history in words alone.

    Args:
      path: folder or file of the layout above.
      split: 'train', 'val' or 'test'.
      modality: 'image', 'video' or 'audio': only records whose answers hold it, or text.
      cleaned: captions in small letters and without the signs that the published code removes.

    Raises:
      UserError: no such file, no list; on access, a broken record.
    """
    root = pathlib.Path(path)
    file = root if os.path.isfile(root) else layout.first_file(root, [f"{split}.json"])
    if modality and modality not in KINDS:
        hint = f"Choices: {', '.join(KINDS)}"
        raise UserError(f"unknown modality {modality!r}", field="options.modality", hint=hint)
    looks = _Looks(modality)
    rows = Rows(file, looks)
    ends = np.cumsum(rows.measures)

    def example(index: int) -> Example:
        place = int(np.searchsorted(ends, index, side="right"))
        inside = index - (int(ends[place - 1]) if place else 0)
        rounds = _rounds(rows[place], rows.place(place))
        question, answer, outputs = rounds[inside]
        made = tuple((kind, clean(said) if cleaned else said) for kind, said in outputs)
        return Example(
            f"{place}-{inside}" if len(rounds) > 1 else str(place),
            instruction=question,
            answer=answer,
            task="draw" if outputs else "dialogue",
            history=tuple((q, MARKER.sub("", a).strip()) for q, a, _ in rounds[:inside]),
            outputs=made,
        )

    return layout.not_empty(Lazy(int(rows.measures.sum()), example), file, "conversations")


def clean(caption: str) -> str:
    """A caption as the published code hands it to the text encoder."""
    text = REMOVED.sub(" ", caption.lower())
    return re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")


class _Looks:
    """Counts the rounds of a record; a broken one counts once, and is reported when it is read."""

    def __init__(self, modality: str):
        self._modality = modality

    def __call__(self, record: object) -> int:
        try:
            rounds = _rounds(record, "")
        except UserError:
            return 1
        kinds = {kind for _, _, outputs in rounds for kind, _ in outputs}
        return 0 if self._modality and kinds - {self._modality} else len(rounds)


def _rounds(record: Any, where: str) -> list[Round]:
    """The rounds of a record in either form."""
    first = isinstance(record, dict) and "conversation" in record
    name = "conversation" if first else "conversations"
    turns = layout.get(record, name, list, where)
    layout.check_few(turns, f"{where}.{name}")
    if not turns or len(turns) % 2:
        raise UserError(f"{len(turns)} turns are no rounds", field=f"{where}.{name}")
    made = []
    for number in range(0, len(turns), 2):
        place = f"{where}.{name}[{number + 1}]"
        question = _said(turns[number], "human", f"{where}.{name}[{number}]")
        answer = _said(turns[number + 1], "gpt", place)
        if first:
            answer, outputs = _first(turns[number + 1], answer, place)
        else:
            outputs = _second(record, answer, where)
        made.append((question, answer, outputs))
    return made


def _said(turn: Any, who: str, where: str) -> str:
    if layout.get(turn, "from", str, where) != who:
        hint = "human and gpt take turns, human first"
        raise UserError(f"is not {who!r}", field=f"{where}.from", hint=hint)
    shown = turn.get("input_modality", TEXT)
    if shown != TEXT:
        raise UserError(f"shows a file ({str(shown)[:20]}) that is not released", field=where)
    return layout.get(turn, "value", str, where).strip()


def _first(turn: dict, answer: str, where: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    """Answer and outputs of a gpt turn of the first version: the picture stands behind the text."""
    kind = layout.get(turn, "output_modality", str, where)
    if kind == TEXT:
        return answer, ()
    if kind not in KINDS:
        hint = f"Choices: {', '.join((TEXT, *KINDS))}"
        what = f"unknown modality {kind[:20]!r}"
        raise UserError(what, field=f"{where}.output_modality", hint=hint)
    caption = layout.get(turn, "caption", str, where)
    if not caption.strip():
        raise UserError("has no caption", field=where)
    answer = MARKER.sub("", answer).strip()
    return f"{answer} <{kind}>".strip(), ((kind, caption),)


def _second(record: dict, answer: str, where: str) -> tuple[tuple[str, str], ...]:
    """Outputs of an answer of the second version, whose markers say where they stand."""
    kinds = MARKER.findall(answer)
    captions: dict[str, list[str]] = {}
    for kind in dict.fromkeys(kinds):
        found = layout.get(record, f"{kind}_captions", (str, list), where)
        captions[kind] = [found] if isinstance(found, str) else list(found)
        if not all(isinstance(one, str) and one.strip() for one in captions[kind]):
            raise UserError("has no caption", field=f"{where}.{kind}_captions")
    if any(kinds.count(kind) != len(captions[kind]) for kind in captions):
        what = "has another number of captions than of markers"
        raise UserError(what, field=where, hint="One caption for each marker in the answers")
    left = {kind: iter(said) for kind, said in captions.items()}
    return tuple((kind, next(left[kind])) for kind in kinds)
