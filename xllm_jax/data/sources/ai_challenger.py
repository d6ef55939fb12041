"""AI Challenger image captions: 240 thousand photographs with five Chinese captions each.

    PATH/caption_train_annotations_20170902.json      [{"url", "image_id": "….jpg",
                                                        "caption": [text, …]}, …]
    PATH/caption_train_images_20170902/               the images, called by image_id
    PATH/caption_validation_annotations_20170910.json, caption_validation_images_20170910/

Both may lie one folder deeper, as the archives unpack them. From the AI Challenger 2017 competition
(github.com/AIChallenger/AI_Challenger_2017); for research, under the competition's terms.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import numpy as np

from xllm_jax.core import litter
from xllm_jax.core.errors import UserError
from xllm_jax.data.example import Example
from xllm_jax.data.rows import files
from xllm_jax.data.rows.lazy import Lazy, Rows
from xllm_jax.data.sources import layout

NAMES = {"val": "validation"}


def examples(
    path: str, split: str = "train", images: str = "", per_caption: bool | None = None
) -> Sequence[Example]:
    """Captioned images, in the order of the file.

    Args:
      path: folder of the layout above.
      split: 'train', 'val' or 'test' (their test_a and test_b, once their captions are there).
      images: folder of the images, if it lies elsewhere.
      per_caption: one example for each caption; default in training only.

    Raises:
      UserError: no such file or folder, broken JSON; on access, a missing key, empty captions.
    """
    root, name = pathlib.Path(path), NAMES.get(split, split)
    pattern = f"caption_{name}*_annotations_*.json"
    found = litter.glob(root, pattern) + litter.glob(root, f"*/{pattern}")
    if not found:
        raise files.missing(root / pattern, (f"*/{pattern}",))
    file = found[0]
    folder = _images(file, images)
    each = split == "train" if per_caption is None else per_caption
    rows = Rows(file, _count if each else lambda row: 1)
    places = np.repeat(np.arange(len(rows), dtype=np.int32), rows.measures)
    firsts = np.cumsum(rows.measures) - rows.measures

    def example(index: int) -> Example:
        place = int(places[index])
        row, where = rows[place], rows.place(place)
        image = layout.get(row, "image_id", str, where)
        captions = layout.get(row, "caption", list, where)
        layout.check_few(captions, where)
        said = [one.strip() for one in captions if isinstance(one, str) and one.strip()]
        if not said or len(said) < len(captions):
            raise UserError("has an empty caption", field=where)
        media = (("image", str(folder / image)),)
        return layout.captioned(image, media, said, "caption", each)[index - int(firsts[place])]

    return layout.not_empty(Lazy(len(places), example), file, "captions")


def _count(row: object) -> int:
    """Captions of a row; a broken row counts once, and is reported when it is read."""
    captions = row.get("caption") if isinstance(row, dict) else None
    return max(len(captions), 1) if isinstance(captions, list) and layout.few(captions) else 1


def _images(file: pathlib.Path, images: str) -> pathlib.Path:
    kind = file.stem.partition("_annotations_")[0]
    default = litter.glob(file.parent, f"{kind}_images_*") or [file.parent / f"{kind}_images"]
    return layout.first_folder([pathlib.Path(images)] if images else default)
