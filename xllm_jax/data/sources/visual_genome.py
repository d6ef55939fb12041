"""Visual Genome: region descriptions and question-answer pairs.

    PATH/region_descriptions.json     [{"id", "regions": [{"image_id", "region_id", "phrase"}]}, …]
    PATH/question_answers.json        [{"id", "qas": [{"image_id", "qa_id", "question", "answer"}]}]
    PATH/VG_100K/, PATH/VG_100K_2/    the images, IMAGE_ID.jpg (or PATH/images/)

From homes.cs.washington.edu/~ranjay/visualgenome (visualgenome.org); CC BY 4.0.
The published set has no splits: all of it is 'train'. PATH/val and PATH/test with the same layout
are read for those splits, and PATH/train, if there, for training. Our own worlds add "tags".
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from xllm_jax.core.errors import UserError
from xllm_jax.data.example import Example
from xllm_jax.data.rows import translated
from xllm_jax.data.rows.lazy import Lazy, Rows
from xllm_jax.data.rows.names import Names, number
from xllm_jax.data.sources import layout

FILES = {"regions": "region_descriptions.json", "questions": "question_answers.json"}
LISTS = {"regions": "regions", "questions": "qas"}
FOLDERS = ("VG_100K", "VG_100K_2", "images", "images2", "image")

Image = Callable[[int], tuple[tuple[str, str], ...]]


def examples(
    path: str, split: str = "train", kind: str = "regions", images: str = "", captions: str = ""
) -> Sequence[Example]:
    """Examples of a split, in the order of the file.

    Args:
      path: folder of the layout above.
      split: 'train', 'val' or 'test'.
      kind: 'regions' (task 'region', all the image's regions are references) or 'questions' (task
        'vqa').
      images: folder of the images, if it lies elsewhere.
      captions: translation of the texts, as the recipe 'translated' writes it.

    Raises:
      UserError: unknown kind, no such file or folder, broken JSON; on access, a missing key.
    """
    if kind not in FILES:
        raise UserError(f"unknown kind {kind!r}", field="kind", hint="Choices: regions, questions")
    root = layout.split_folder(pathlib.Path(path), split)
    folders = [pathlib.Path(images)] if images else [root / name for name in FOLDERS]
    first = layout.first_folder(folders)
    files = [Names(folder, _image_number) for folder in folders]
    name = FILES[kind]
    file = layout.first_file(root, (name, f"*/{name}", name.replace(".json", "_v*.json")))
    rows = Rows(file, lambda row: _count(row, LISTS[kind]))
    ends = np.cumsum(rows.measures)
    read = _region if kind == "regions" else _question

    def image(wanted: int) -> tuple[tuple[str, str], ...]:
        for names in files:
            (at,) = names.find([wanted])
            if at >= 0:
                return (("image", names.path(at)),)
        # Reported when it is opened, with all other unreadable ones.
        return (("image", str(first / f"{wanted}.jpg")),)

    def example(index: int) -> Example:
        place = int(np.searchsorted(ends, index, side="right"))
        inside = index - (int(ends[place - 1]) if place else 0)
        return read(rows[place], rows.place(place), inside, image)

    found = layout.not_empty(Lazy(int(rows.measures.sum()), example), file, kind)
    return translated.examples(found, captions, split)


def _image_number(name: str) -> int | None:
    return number(name) if name.lower().endswith(layout.IMAGES) else None


def _count(row: object, name: str) -> int:
    """Examples of an image; a broken row counts once, and is reported when it is read."""
    inside = row.get(name) if isinstance(row, dict) else None
    return len(inside) if isinstance(inside, list) and layout.few(inside) else 1


def _region(row: object, where: str, index: int, image: Image) -> Example:
    regions = layout.get(row, "regions", list, where)
    layout.check_few(regions, where)
    place = f"{where}.regions[{index}]"
    phrases, at = layout.said(regions, index, "phrase", place)
    region = regions[index]
    media = image(layout.get(region, "image_id", int, place))
    key = f"region-{layout.get(region, 'region_id', int, place)}"
    tags = layout.tags(region)
    return Example(key, media, "", phrases[at], "region", (), phrases, tags=tags)


def _question(row: object, where: str, index: int, image: Image) -> Example:
    every, place = layout.get(row, "qas", list, where), f"{where}.qas[{index}]"
    layout.check_few(every, where)
    asked = every[index]
    media = image(layout.get(asked, "image_id", int, place))
    question = layout.text(asked, "question", place)
    answer = layout.text(asked, "answer", place)
    key = f"question-{layout.get(asked, 'qa_id', int, place)}"
    return Example(key, media, question, answer, "vqa", tags=layout.tags(asked))
