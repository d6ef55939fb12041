"""Instruction conversations for stage 3: LLaVA's form, and MiniGPT-4's captions.

    PATH/SPLIT.json, or PATH/SPLIT.jsonl with one of these a line (or PATH is the file)
      [{"id", "image": file, "video": file, "speech": file, "conversations":
        [{"from": "human", "value": "<image>\\n…"}, {"from": "gpt", "value": "…"}, …]}, …]

Each of image, video, speech and the option `modalities` may be missing, one file, or a list of
files. <image>, <video> and <speech> in the human turns order them; without slots they come first.
Optional keys: "task", "transcript" (what the speech says), "tags". Files are relative to PATH's
parent or PATH, whichever has the first one, or to the option `media`.

    PATH/filter_cap.json     MiniGPT-4: {"annotations": [{"image_id", "caption"}, …]}
    PATH/image/              its images, IMAGE_ID.jpg

LLaVA's own files (llava_instruct_150k.json, llava_v1_5_mix665k.json, chat.json …) stand for
train.json, filter_cap_zh.json and a folder cc_sbu_align/ for MiniGPT-4's.

MiniGPT-4's second-stage set (cc_sbu_align) is linked by github.com/Vision-CAIR/MiniGPT-4, for
research; the paper translates its captions into Chinese in the same file.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from xllm_jax.core.errors import UserError
from xllm_jax.data.example import Example
from xllm_jax.data.media.modalities import named, task
from xllm_jax.data.media.modality import Modality
from xllm_jax.data.rows import translated
from xllm_jax.data.rows.lazy import Lazy, Rows
from xllm_jax.data.sources import layout

Known = Mapping[str, Modality]
MINIGPT4 = ("filter_cap.json", "filter_cap_zh.json")
LLAVA = (
    *("llava_instruct_150k.json", "llava_v1_5_mix665k.json", "llava_instruct_80k.json"),
    *("blip_laion_cc_sbu_558k.json", "chat.json"),
)


def examples(
    path: str,
    split: str = "train",
    media: str = "",
    modality: str = "",
    modalities: Mapping[str, str] | None = None,
    captions: str = "",
) -> Sequence[Example]:
    """One example per answer, earlier rounds of its conversation as history.

    Args:
      path: folder or file of the layout above.
      split: 'train', 'val' or 'test'.
      media: folder that media paths start from, if it is another one.
      modality: one, or several as in 'image+speech': only conversations about just that.
      modalities: {name: 'package.module:NAME'} of the records of further modalities.
      captions: translation of the texts, as the recipe 'translated' writes it.

    Raises:
      UserError: no such file, no list; on access, a broken record: a missing key, turns out of
        order, an empty answer or question, slots and files that do not match.
    """
    root = pathlib.Path(path)
    places = [root / place / name for place in ("", "cc_sbu_align") for name in MINIGPT4]
    minigpt4 = [place for place in places if os.path.isfile(place)]
    if split == "train" and minigpt4:
        return translated.examples(_captions(minigpt4[0]), captions, split)
    names = [f"{split}.json", f"{split}.jsonl", *(LLAVA if split == "train" else ())]
    file = root if os.path.isfile(root) else layout.first_file(root, names)
    known = named(modalities or {}, "modalities")
    looks = _Looks(known, set(modality.split("+")) if modality else set())
    rows = Rows(file, looks)
    if len(rows) and not looks.good:
        _talk(rows[0], known, rows.place(0))  # says what is wrong with all of them
    folder = pathlib.Path(media) if media else _folder(rows, looks.first, known)
    ends = np.cumsum(rows.measures)

    def example(index: int) -> Example:
        place = int(np.searchsorted(ends, index, side="right"))
        inside = index - (int(ends[place - 1]) if place else 0)
        talk = _talk(rows[place], known, rows.place(place))
        return _example(talk, inside, folder, str(place))

    found = layout.not_empty(Lazy(int(rows.measures.sum()), example), file, "conversations")
    return translated.examples(found, captions, split)


@dataclasses.dataclass(frozen=True)
class Talk:
    """A conversation: its slots with their files, its (question, answer) rounds, and the record."""

    media: tuple[tuple[str, str], ...]
    rounds: list[tuple[str, str]]
    task: str
    record: dict[str, Any]


class _Looks:
    """Counts the examples of a record that is about some modalities, or any.

    A broken record counts once, and is reported when it is read.

    Attributes:
      first: number of the first record that names a file, -1 while there is none.
      good: records that are not broken.
    """

    def __init__(self, known: Known, kinds: set[str]):
        # Records that are met while a file is gone over are not yet UTF-8, so no keys are either.
        self._known = {_latin(name): one for name, one in known.items()}
        self._kinds, self._seen, self.first, self.good = set(map(_latin, kinds)), 0, -1, 0

    def __call__(self, record: object) -> int:
        number, self._seen = self._seen, self._seen + 1
        try:
            talk = _talk(record, self._known, "")
        except UserError:
            return 1
        self.good += 1
        self.first = number if talk.media and self.first < 0 else self.first
        asked = not self._kinds or {kind for kind, _ in talk.media} == self._kinds
        return len(talk.rounds) if asked else 0


def _latin(name: str) -> str:
    return name.encode("utf-8").decode("latin-1")


def _captions(file: pathlib.Path) -> Sequence[Example]:
    """MiniGPT-4's captions."""
    rows = Rows(file, name="annotations")
    files = layout.files([file.parent / "image"], layout.IMAGES)

    def example(index: int) -> Example:
        row, where = rows[index], rows.place(index)
        name = str(layout.get(row, "image_id", (str, int), where))
        path = files.get(name, str(file.parent / "image" / f"{name}.jpg"))
        return layout.captioned_image(name, path, layout.get(row, "caption", str, where), where)

    return layout.not_empty(Lazy(len(rows), example), file, "captions")


def _files(record: dict, known: Known, where: str) -> dict[str, list[str]]:
    found = {}
    for name in known:
        value = layout.get(record, name, (str, list), where) if record.get(name) else []
        found[name] = [value] if isinstance(value, str) else value
        if not all(isinstance(one, str) for one in found[name]):
            raise UserError("names a file that is no text", field=f"{where}.{name}")
    return found


def _folder(rows: Rows, first: int, known: Known) -> pathlib.Path:
    """Where the files of a list are: PATH's parent or PATH, whichever has the first one."""
    places = (rows.path.parent.parent, rows.path.parent)
    if first < 0:
        return places[1]
    _, name = _talk(rows[first], known, rows.place(first)).media[0]
    return next((place for place in places if os.path.exists(place / name)), places[1])


def _talk(record: Any, known: Known, where: str) -> Talk:
    """A record, checked; paths as they stand there."""
    turns = layout.get(record, "conversations", list, where)
    layout.check_few(turns[::2], f"{where}.conversations")
    files = _files(record, known, where)
    marker = re.compile(f"<({'|'.join(map(re.escape, known))})>")
    texts = [
        layout.get(t, "value", str, f"{where}.conversations[{i}]") for i, t in enumerate(turns)
    ]
    _check_order(turns, where)
    _check_said(texts, any(files.values()), where)
    slots = [slot for text in texts[::2] for slot in marker.findall(text)]
    named = [name for name in known for _ in files[name]]
    slots = slots or named
    if sorted(slots) != sorted(named):
        what = f"slots {slots[:8]} do not match the files of {[n for n in known if files[n]]}"
        raise UserError(what, field=where, hint="One slot for each file")
    rest = {name: iter(paths) for name, paths in files.items()}
    media = tuple((slot, next(rest[slot])) for slot in slots)
    rounds = [(marker.sub("", q).strip(), a.strip()) for q, a in zip(texts[::2], texts[1::2])]
    kind = layout.get(record, "task", str, where) if record.get("task") else _task(files, known)
    return Talk(media, rounds, kind, record)


def _example(talk: Talk, number: int, folder: pathlib.Path, name: str) -> Example:
    """One round of a conversation, those before it as history."""
    record, (question, answer) = talk.record, talk.rounds[number]
    key = str(record.get("id", name))
    said = layout.get(record, "transcript", str, key) if record.get("transcript") else ""
    return Example(
        f"{key}-{number}" if len(talk.rounds) > 1 else key,
        tuple((slot, str(folder / path)) for slot, path in talk.media),
        question,
        answer,
        talk.task,
        tuple(talk.rounds[:number]),
        references=(answer,),
        transcript=said,
        tags=layout.tags(record),
    )


def _check_order(turns: list, where: str) -> None:
    if not turns or len(turns) % 2:
        raise UserError(f"{len(turns)} turns are no rounds", field=f"{where}.conversations")
    for index, turn in enumerate(turns):
        place = f"{where}.conversations[{index}]"
        who = layout.get(turn, "from", str, place)
        wanted = ("human", "user") if index % 2 == 0 else ("gpt", "assistant")
        if who not in wanted:
            hint = "human and gpt take turns, human first"
            raise UserError(f"is {who!r}, not {wanted[0]!r}", field=f"{place}.from", hint=hint)


def _check_said(texts: Sequence[str], shown: bool, where: str) -> None:
    """Raises UserError where a turn says nothing; files may stand for the first question."""
    for index, text in enumerate(texts):
        if not text.strip() and (index or not shown):
            what = "has an empty answer" if index % 2 else "has an empty question"
            raise UserError(what, field=f"{where}.conversations[{index}]")


def _task(files: dict[str, list[str]], known: Known) -> str:
    present = [name for name, paths in files.items() if paths]
    if any(known[name].spoken for name in present):
        return task(present, known)
    return "dialogue" if present else "text"
