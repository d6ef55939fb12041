"""VisDial 1.0, and its spoken form as in VSDial-CN (each question also as an audio file).

    PATH/visdial_1.0_SPLIT.json     {"data": {"questions": [text, …], "answers": [text, …],
                                     "dialogs": [{"image_id", "caption", "dialog":
                                       [{"question": number, "answer": number, "speech": file}]}]}}

These files may lie one folder deeper; version 0.9 has the same form.

From visualdialog.org; CC BY 4.0, images from COCO and Flickr.
"speech", a path relative to PATH, is there in spoken sets only, and may be missing in some rounds.
Images are found by the number at the end of their names (COCO_train2014_000000000123.jpg) in
PATH/images, PATH/SPLIT*, PATH/VisualDialog_SPLIT*, or a COCO folder beside PATH. Our own worlds add
"tags" and "speech_tags" to rounds.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
from collections.abc import Sequence

import numpy as np

from xllm_jax.core.errors import UserError
from xllm_jax.data.example import Example
from xllm_jax.data.rows import json_spans, translated
from xllm_jax.data.rows.lazy import Lazy, Spans
from xllm_jax.data.rows.names import Names
from xllm_jax.data.sources import layout

KINDS = ("dialogue", "spoken", "asr", "asr_image")
POOLS = ("question", "answer")


@dataclasses.dataclass(frozen=True)
class Round:
    """One round: texts, speech file ('' if written only), tags of the text and of the voice."""

    question: str
    answer: str
    speech: str
    tags: tuple[str, ...]
    speech_tags: tuple[str, ...]


BESIDE = ("coco",)  # may lie next to PATH


def examples(
    path: str,
    split: str = "train",
    kind: str = "dialogue",
    images: str = "",
    history: bool = False,
    captions: str = "",
) -> Sequence[Example]:
    """Examples of a split, one per round, in the order of the file.

    Args:
      path: folder of the layout above.
      split: 'train', 'val' or 'test'.
      kind: 'dialogue' (image, written question, earlier rounds), 'spoken' (image and spoken
        question), 'asr' (spoken question alone, whose transcript is the answer) or 'asr_image' (the
        same beside the image).
      images: folder of the images, if it lies elsewhere.
      history: give the earlier rounds to spoken questions, too.
      captions: translation of the texts, as the recipe 'translated' writes it.

    Raises:
      UserError: unknown kind, no such file or folder, broken JSON, no rounds; on access, a missing
        key, a number out of range, an image that is not there.
    """
    if kind not in KINDS:
        raise UserError(f"unknown kind {kind!r}", field="kind", hint=f"Choices: {', '.join(KINDS)}")
    root = pathlib.Path(path)
    names = (f"visdial_1.0_{split}.json", f"visdial_0.9_{split}.json")
    file = layout.first_file(root, [*names, *(f"*/{name}" for name in names)])
    talks, pools, counts = _read(file, kind)
    ends = np.cumsum(counts)
    pictures = [] if kind == "asr" else _pictures(root, split, images)

    def example(index: int) -> Example:
        place = int(np.searchsorted(ends, index, side="right"))
        inside = index - (int(ends[place - 1]) if place else 0)
        talk, where = talks[place], talks.place(place)
        number = layout.get(talk, "image_id", int, where)
        rows = layout.get(talk, "dialog", list, where)
        layout.check_few(rows, where)
        spoken = [n for n, row in enumerate(rows) if kind == "dialogue" or _speech(row, where)]
        now = spoken[inside] if inside < len(spoken) else inside
        rounds = _rounds(rows[: now + 1], pools, root, where)
        picture = "" if kind == "asr" else _picture(pictures, number, where)
        return _example(f"{number}-{now}", rounds, kind, picture, history)

    found = layout.not_empty(Lazy(int(counts.sum()), example), file, f"rounds for {kind!r}")
    return translated.examples(found, captions, split)


def _read(file: pathlib.Path, kind: str) -> tuple[Spans, tuple[Spans, ...], np.ndarray]:
    """(dialogues, questions and answers, examples of each dialogue)."""

    def count(talk: object, _: int) -> int:
        """A broken dialogue counts once, and is reported when it is read."""
        rows = talk.get("dialog") if isinstance(talk, dict) else None
        if not isinstance(rows, list) or not layout.few(rows):
            return 1
        if not all(isinstance(row, dict) for row in rows):
            return 1
        return len(rows) if kind == "dialogue" else sum(bool(row.get("speech")) for row in rows)

    names = ("data.dialogs", *(f"data.{name}s" for name in POOLS))
    found = json_spans.find(file, {names[0]: count, names[1]: None, names[2]: None})
    talks, *pools = (
        Spans(file, found[name].spans, name.replace("data.dialogs", "dialogs")) for name in names
    )
    return talks, tuple(pools), np.asarray(found[names[0]].notes, np.int32)


def _rounds(
    rows: Sequence[object], pools: Sequence[Spans], root: pathlib.Path, where: str
) -> list[Round]:
    places = [f"{where}.dialog[{index}]" for index in range(len(rows))]
    said = []
    for name, pool in zip(POOLS, pools):
        numbers = [layout.get(row, name, int, place) for row, place in zip(rows, places)]
        for number, place in zip(numbers, places):
            if not 0 <= number < len(pool):
                raise UserError(f"{number} is not in 0..{len(pool) - 1}", field=f"{place}.{name}")
        said.append(
            [_text(text, pool.place(at)) for text, at in zip(pool.several(numbers), numbers)]
        )
    return [
        Round(
            question,
            answer,
            str(root / spoken) if (spoken := _speech(row, where)) else "",
            layout.tags(row),
            layout.tags(row, "speech_tags"),
        )
        for row, question, answer in zip(rows, *said)
    ]


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise UserError("is no text", field=where)
    if not (text := value.strip()):
        raise UserError("is an empty text", field=where)
    return text


def _speech(row: object, where: str) -> str:
    """The speech file of a round, '' where it was only written."""
    if not isinstance(row, dict):
        raise UserError("has a round that is no object", field=f"{where}.dialog")
    return layout.get(row, "speech", str, where) if row.get("speech") else ""


def _example(key: str, rounds: list[Round], kind: str, picture: str, history: bool) -> Example:
    """The last of some rounds."""
    *past, now = rounds
    said, earlier = layout.unpunctuated(now.question), tuple((p.question, p.answer) for p in past)
    if kind != "dialogue" and not said:
        raise UserError("asks nothing that can be spoken", field=key)
    image, speech, tags = ("image", picture), ("speech", now.speech), now.tags + now.speech_tags
    if kind == "dialogue":
        media = (image,)
        return Example(key, media, now.question, now.answer, kind, earlier, tags=now.tags)
    if kind == "spoken":
        before, media = earlier if history else (), (image, speech)
        return Example(key, media, "", now.answer, "spoken_vqa", before, transcript=said, tags=tags)
    media = (image, speech) if kind == "asr_image" else (speech,)
    return Example(key, media, "", said, "asr", transcript=said, references=(said,), tags=tags)


def _pictures(root: pathlib.Path, split: str, images: str) -> list[Names]:
    """The images that the layout may use, by number; the first folder that has one wins."""
    places = [root / "images"]
    for folder in (root, root.parent / "coco"):
        places += sorted(folder.glob(f"{split}*")) + sorted(folder.glob(f"VisualDialog_{split}*"))
    places += [root.parent / "coco" / "val2014"]
    folders = [place for place in places if place.is_dir()]
    wanted = [pathlib.Path(images)] if images else folders or places[:1]
    layout.first_folder(wanted)
    return [Names(folder, _number) for folder in wanted]


def _number(name: str) -> int | None:
    """The number at the end of an image's name."""
    stem, suffix = os.path.splitext(name)
    digits = re.search(r"(\d{1,18})$", stem) if suffix.lower() in layout.IMAGES else None
    return int(digits.group()) if digits else None


def _picture(pictures: Sequence[Names], number: int, where: str) -> str:
    for names in pictures:
        (at,) = names.find([number])
        if at >= 0:
            return names.path(at)
    hint = "Name the folder of the images by the option 'images'"
    raise UserError(f"no image file of number {number}", field=where, hint=hint)
