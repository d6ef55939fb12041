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

from xllm_jax.core.errors import UserError
from xllm_jax.data.example import Example
from xllm_jax.data.sources import layout


def examples(
    path: str, split: str = "train", kind: str = "regions", images: str = ""
) -> list[Example]:
    """Examples of a split, in the order of the file.

    Args:
      path: folder of the layout above.
      split: 'train', 'val' or 'test'.
      kind: 'regions' (task 'region', all the image's regions are references) or 'questions' (task
        'vqa').
      images: folder of the images, if it lies elsewhere.

    Raises:
      UserError: unknown kind, no such file or folder, broken JSON, a missing key.
    """
    if kind not in ("regions", "questions"):
        raise UserError(f"unknown kind {kind!r}", field="kind", mend="Choices: regions, questions")
    root = layout.split_folder(pathlib.Path(path), split)
    name = "region_descriptions.json" if kind == "regions" else "question_answers.json"
    data = layout.rows(layout.read_json(root / name), str(root / name))
    candidates = [root / "VG_100K", root / "VG_100K_2", root / "images"]
    candidates = [pathlib.Path(images)] if images else candidates
    first = layout.first_folder(candidates)
    files = layout.files(candidates, layout.IMAGES)

    def image(number: int) -> tuple[tuple[str, str], ...]:
        # A file that is not there is reported when it is opened, with all other unreadable ones.
        return (("image", files.get(str(number), str(first / f"{number}.jpg"))),)

    read = _regions if kind == "regions" else _questions
    found: list[Example] = []
    for index, row in enumerate(data):
        found += read(row, f"{root / name}: [{index}]", image)
    return layout.not_empty(found, root / name, kind)


def _regions(row, where: str, image) -> list[Example]:
    regions = layout.get(row, "regions", list, where)
    phrases = tuple(
        layout.get(region, "phrase", str, f"{where}.regions[{index}]").strip()
        for index, region in enumerate(regions)
    )
    found = []
    for index, (region, phrase) in enumerate(zip(regions, phrases)):
        place = f"{where}.regions[{index}]"
        number = layout.get(region, "image_id", int, place)
        key = f"region-{layout.get(region, 'region_id', int, place)}"
        found.append(
            Example(
                key,
                image(number),
                answer=phrase,
                task="region",
                references=phrases,
                tags=layout.tags(region),
            )
        )
    return found


def _questions(row, where: str, image) -> list[Example]:
    found = []
    for index, asked in enumerate(layout.get(row, "qas", list, where)):
        place = f"{where}.qas[{index}]"
        number = layout.get(asked, "image_id", int, place)
        question = layout.get(asked, "question", str, place).strip()
        answer = layout.get(asked, "answer", str, place).strip()
        key = f"question-{layout.get(asked, 'qa_id', int, place)}"
        tags = layout.tags(asked)
        found.append(Example(key, image(number), question, answer, "vqa", tags=tags))
    return found
