"""VQA v2: questions about COCO's photographs, each answered by ten people.

    PATH/v2_OpenEnded_mscoco_SPLIT2014_questions.json     {"questions": [
                                                            {"question_id", "image_id", "question"},
                                                            …]}
    PATH/v2_mscoco_SPLIT2014_annotations.json             {"annotations": [
                                                            {"question_id", "answers": [{"answer"},
                                                            …], "multiple_choice_answer",
                                                            "answer_type", "question_type"}, …]}
    PATH/SPLIT2014/COCO_SPLIT2014_000000262148.jpg        the images, also in images/ or in ../coco

Both files may lie one folder deeper, and whatever stands before SPLIT2014 in their names will do.
From visualqa.org; annotations CC BY 4.0, images under Flickr's terms. The answers to 'test' are not
published. Tags are the kinds of answer and question.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from xllm_jax.core import litter
from xllm_jax.core.errors import UserError
from xllm_jax.data.example import Example
from xllm_jax.data.rows import files, translated
from xllm_jax.data.rows.lazy import Lazy, Rows
from xllm_jax.data.sources import layout

BESIDE = ("coco",)  # may lie next to PATH
UNKNOWN = -1  # the number of a row without one


def examples(
    path: str, split: str = "train", images: str = "", captions: str = ""
) -> Sequence[Example]:
    """Questions with their answers, in the order of the questions file.

    Args:
      path: folder of the layout above.
      split: 'train' or 'val'.
      images: folder of the images, if it lies elsewhere.
      captions: translation of the texts, as the recipe 'translated' writes it.

    Raises:
      UserError: no such file or folder, broken JSON; on access, a question without its answers, a
        missing key or an empty text.
    """
    root = pathlib.Path(path)
    asked = Rows(_file(root, f"*{split}2014_questions.json"), name="questions")
    said = Rows(_file(root, f"*{split}2014_annotations.json"), _number, "annotations")
    name = f"{split}2014"
    places = [root / name, root / "images" / name, root / "images", root.parent / "coco" / name]
    folder = layout.first_folder([pathlib.Path(images)] if images else places)
    order = np.argsort(said.measures, kind="stable")
    numbers = said.measures[order]

    def example(index: int) -> Example:
        row, where = asked[index], asked.place(index)
        number = layout.get(row, "question_id", int, where)
        at = int(np.searchsorted(numbers, number)) if number > UNKNOWN else len(numbers)
        if at == len(numbers) or numbers[at] != number:
            raise UserError(f"question {number} has no answers", field=where)
        answers = said[int(order[at])]
        return _example(row, where, answers, said.place(int(order[at])), folder, split)

    found = layout.not_empty(Lazy(len(asked), example), root, "questions")
    return translated.examples(found, captions, split)


def _file(root: pathlib.Path, pattern: str) -> pathlib.Path:
    found = litter.glob(root, pattern) + litter.glob(root, f"*/{pattern}")
    if not found:
        raise files.missing(root / pattern, (f"*/{pattern}",))
    return found[0]


def _number(row: object) -> int:
    number = row.get("question_id") if isinstance(row, dict) else None
    if not isinstance(number, int) or isinstance(number, bool):
        return UNKNOWN
    return number if 0 <= number < 1 << 62 else UNKNOWN


def _example(
    row: Any, where: str, answers: Any, there: str, folder: pathlib.Path, split: str
) -> Example:
    number = layout.get(row, "image_id", int, where)
    if not 0 <= number < 10**12:
        raise UserError(f"{number} is no image of COCO", field=f"{where}.image_id")
    path = folder / f"COCO_{split}2014_{number:012d}.jpg"
    if not os.path.isfile(path):
        path = folder / f"{number:012d}.jpg"
    rows = layout.get(answers, "answers", list, there)
    layout.check_few(rows, there)
    said = tuple(layout.text(one, "answer", f"{there}.answers[{i}]") for i, one in enumerate(rows))
    if not said:
        raise UserError("has no answers", field=there)
    best = answers.get("multiple_choice_answer")
    best = best.strip() if isinstance(best, str) and best.strip() else said[0]
    kinds = (answers.get("answer_type"), answers.get("question_type"))
    return Example(
        str(row["question_id"]),
        (("image", str(path)),),
        layout.text(row, "question", where),
        best,
        "vqa",
        references=said,
        tags=tuple(kind for kind in kinds if isinstance(kind, str)),
    )
