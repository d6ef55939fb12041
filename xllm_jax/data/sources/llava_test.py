"""LLaVA-test: 30 COCO photographs with three questions each, the paper's evaluation of chat.

    PATH/qa90_questions.jsonl      {"question_id", "image": "000000441147.jpg", "text", "category"}
    PATH/qa90_gpt4_answer.jsonl    {"question_id", "text"}: GPT-4's answers, the reference
    PATH/images/                   the images, also as COCO_val2014_000000441147.jpg

From github.com/haotian-liu/LLaVA (playground/data/coco2014_val_qa_eval), images from COCO val2014.
LLaVA's data were CC BY-NC 4.0 when they came out and are CC BY 4.0 by their card today; OpenAI's
terms apply to GPT-4's answers. Categories are 'conv', 'detail' and 'complex'. The paper asks in
Chinese: the options `questions` and `answers` name other files of the form.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence

from xllm_jax.core.errors import UserError
from xllm_jax.data.example import Example
from xllm_jax.data.rows import translated
from xllm_jax.data.rows.lazy import Lazy, Rows
from xllm_jax.data.sources import layout

QUESTIONS, ANSWERS = "qa90_questions.jsonl", "qa90_gpt4_answer.jsonl"
BESIDE = ("coco",)  # may lie next to PATH


def examples(
    path: str,
    split: str = "test",
    images: str = "",
    questions: str = "",
    answers: str = "",
    captions: str = "",
) -> Sequence[Example]:
    """Questions about images, in the order of the file; tags are their categories.

    Args:
      path: folder of the layout above.
      split: 'test'; the set has no other.
      images: folder of the images, if it lies elsewhere.
      questions: file of other questions.
      answers: file of other answers. Without one, the answers are empty.
      captions: translation of the texts, as the recipe 'translated' writes it.

    Raises:
      UserError: no such split, file or folder; on access, a broken question.
    """
    if split != "test":
        raise UserError(f"has no split {split!r}", field=path, hint="It is for evaluation: test")
    root = pathlib.Path(path)
    asked = Rows(questions or layout.first_file(root, (QUESTIONS, f"*/{QUESTIONS}")))
    said = _answers(asked.path.parent, answers)
    places = [root / "images", root / "val2014", root.parent / "coco" / "val2014", root]
    folder = layout.first_folder([pathlib.Path(images)] if images else places)

    def example(index: int) -> Example:
        row, where = asked[index], asked.place(index)
        number = layout.get(row, "question_id", (int, str), where)
        name = layout.get(row, "image", str, where)
        text = layout.text(row, "text", where)
        other = folder / f"COCO_val2014_{name}"
        media = (("image", str(other if os.path.isfile(other) else folder / name)),)
        answer = said.get(str(number), "")
        tags = (str(row["category"]),) if row.get("category") else ()
        return Example(str(number), media, text, answer, "dialogue", tags=tags)

    found = layout.not_empty(Lazy(len(asked), example), root, "questions")
    return translated.examples(found, captions, split)


def _answers(root: pathlib.Path, answers: str) -> dict[str, str]:
    file = pathlib.Path(answers) if answers else root / ANSWERS
    if not answers and not file.is_file():
        return {}
    found = {}
    for row in Rows(file).tried():  # a broken answer is none
        known = row if isinstance(row, dict) else {}
        number, text = known.get("question_id"), known.get("text")
        if isinstance(number, int | str) and isinstance(text, str):
            found[str(number)] = text.strip()
    return found
