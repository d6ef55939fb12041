"""VisDial 1.0, and its spoken form as in VSDial-CN (each question also as an audio file).

    PATH/visdial_1.0_SPLIT.json     {"data": {"questions": [text, …], "answers": [text, …],
                                     "dialogs": [{"image_id", "caption", "dialog":
                                       [{"question": number, "answer": number, "speech": file}]}]}}

From visualdialog.org; CC BY 4.0, images from COCO and Flickr.
"speech", a path relative to PATH, is there in spoken sets only, and may be missing in some rounds.
Images are found by the number at the end of their names (COCO_train2014_000000000123.jpg) in
PATH/images, PATH/SPLIT*, PATH/VisualDialog_SPLIT*, or a COCO folder beside PATH. Our own worlds add
"tags" and "speech_tags" to rounds.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re

from xllm_jax.core.errors import UserError
from xllm_jax.data.example import Example
from xllm_jax.data.sources import layout

KINDS = ("dialogue", "spoken", "asr")


@dataclasses.dataclass(frozen=True)
class Round:
    """One round: texts, speech file ('' if written only), tags of the text and of the voice."""

    question: str
    answer: str
    speech: str
    tags: tuple[str, ...]
    speech_tags: tuple[str, ...]


def examples(
    path: str, split: str = "train", kind: str = "dialogue", images: str = "", history: bool = False
) -> list[Example]:
    """Examples of a split, one per round, in the order of the file.

    Args:
      path: folder of the layout above.
      split: 'train', 'val' or 'test'.
      kind: 'dialogue' (image, written question, earlier rounds), 'spoken' (image and spoken
        question) or 'asr' (spoken question alone, whose transcript is the answer).
      images: folder of the images, if it lies elsewhere.
      history: give the earlier rounds to spoken questions, too.

    Raises:
      UserError: unknown kind, no such file or folder, broken JSON, a missing key, a number out of
        range, an image that is not there.
    """
    if kind not in KINDS:
        raise UserError(f"unknown kind {kind!r}", field="kind", mend=f"Choices: {', '.join(KINDS)}")
    root = pathlib.Path(path)
    file = root / f"visdial_1.0_{split}.json"
    data = layout.get(layout.read_json(file), "data", dict, str(file))
    lists = [layout.get(data, name, list, f"{file}: data") for name in ("questions", "answers")]
    pictures = {} if kind == "asr" else _pictures(root, split, images)
    found: list[Example] = []
    for index, talk in enumerate(layout.get(data, "dialogs", list, f"{file}: data")):
        where = f"{file}: dialogs[{index}]"
        number = layout.get(talk, "image_id", int, where)
        if kind != "asr" and number not in pictures:
            mend = "Name the folder of the images by the option 'images'"
            raise UserError(f"no image file of number {number}", field=where, mend=mend)
        rounds = _rounds(talk, lists, root, where)
        found += _examples(number, rounds, kind, pictures.get(number, ""), history)
    return layout.not_empty(found, file, f"rounds for {kind!r}")


def _rounds(talk: dict, lists: list[list], root: pathlib.Path, where: str) -> list[Round]:
    found = []
    for index, row in enumerate(layout.get(talk, "dialog", list, where)):
        place = f"{where}.dialog[{index}]"
        texts = []
        for name, pool in zip(("question", "answer"), lists):
            number = layout.get(row, name, int, place)
            if not 0 <= number < len(pool):
                raise UserError(f"{number} is not in 0..{len(pool) - 1}", field=f"{place}.{name}")
            texts.append(str(pool[number]).strip())
        speech = str(root / row["speech"]) if row.get("speech") else ""
        spoken = tuple(map(str, row.get("speech_tags", ())))
        found.append(Round(*texts, speech, layout.tags(row), spoken))
    return found


def _examples(
    number: int, rounds: list[Round], kind: str, picture: str, history: bool
) -> list[Example]:
    found = []
    for index, now in enumerate(rounds):
        if kind != "dialogue" and not now.speech:
            continue
        key, said = f"{number}-{index}", layout.unpunctuated(now.question)
        earlier = tuple((past.question, past.answer) for past in rounds[:index])
        image, speech = ("image", picture), ("speech", now.speech)
        if kind == "dialogue":
            made = Example(key, (image,), now.question, now.answer, kind, earlier)
        elif kind == "spoken":
            before = earlier if history else ()
            made = Example(key, (image, speech), "", now.answer, "spoken_vqa", before)
            made = dataclasses.replace(made, transcript=said)
        else:
            made = Example(key, (speech,), "", said, "asr", transcript=said, references=(said,))
        tags = now.tags if kind == "dialogue" else now.tags + now.speech_tags
        found.append(dataclasses.replace(made, tags=tags))
    return found


def _pictures(root: pathlib.Path, split: str, images: str) -> dict[int, str]:
    """{image number: path} of all images that the layout may use."""
    places = [root / "images"]
    for folder in (root, root.parent / "coco"):
        places += sorted(folder.glob(f"{split}*")) + sorted(folder.glob(f"VisualDialog_{split}*"))
    places += [root.parent / "coco" / "val2014"]
    folders = [place for place in places if place.is_dir()]
    wanted = [pathlib.Path(images)] if images else folders or places[:1]
    layout.first_folder(wanted)
    found: dict[int, str] = {}
    for stem, path in layout.files(wanted, layout.IMAGES).items():
        digits = re.search(r"(\d+)$", stem)
        if digits:
            found.setdefault(int(digits.group()), path)
    return found
