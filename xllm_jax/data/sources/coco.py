"""COCO captions, and other sets that are kept in COCO's form.

    PATH/annotations/captions_SPLIT*.json     {"images": [{"id", "file_name"}, …],
                                               "annotations": [{"image_id", "caption"}, …]}
    PATH/SPLIT*/ or PATH/images/SPLIT*/       the images, called as the captions file is: train2014/

As mirrors have it: the captions file in PATH or one folder deeper, Karpathy's dataset_coco.json or
BLIP's coco_karpathy_SPLIT.json, with their images below PATH (train2014/, val2014/).

From cocodataset.org; annotations CC BY 4.0, images under Flickr's terms. Our own worlds add "tags"
to annotations.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from xllm_jax.core import litter
from xllm_jax.core.errors import UserError
from xllm_jax.data.example import Example
from xllm_jax.data.rows import translated
from xllm_jax.data.rows.joined_lists import Groups
from xllm_jax.data.rows.lazy import Lazy
from xllm_jax.data.sources import captioned_list, layout

MIRRORS = (
    *("annotations/captions_SPLIT.json", "captions_SPLIT*.json"),
    *("*/annotations/captions_SPLIT*.json", "*/captions_SPLIT*.json"),
    *("dataset_coco.json", "*/dataset_coco.json"),
    *("coco_karpathy_SPLIT.json", "*/coco_karpathy_SPLIT.json"),
)
OTHER_FORMS = ("dataset_", "coco_karpathy_")


def examples(
    path: str,
    split: str = "train",
    images: str = "",
    annotations: str = "",
    per_caption: bool | None = None,
    captions: str = "",
) -> Sequence[Example]:
    """Caption examples of a split, in the order of the images.

    Args:
      path: folder of the layout above.
      split: 'train', 'val' or 'test'.
      images: folder of the images, if it lies elsewhere.
      annotations: the captions file, if it has another name.
      per_caption: one example for each caption; default in training only. Otherwise one per image.
      captions: translation of the texts, as the recipe 'translated' writes it.

    Raises:
      UserError: no such file or folder, broken JSON, no captions; on access, a missing key, an
        annotation of no image.
    """
    root = pathlib.Path(path)
    file = pathlib.Path(annotations) if annotations else _captions_file(root, split)
    each = split == "train" if per_caption is None else per_caption
    if file.name.startswith(OTHER_FORMS):
        found = _other_form(file, split, [pathlib.Path(images)] if images else [root], each)
        return translated.examples(layout.not_empty(found, file, "captions"), captions, split)
    groups = Groups(file, ("images", "id", lambda row: True), ("annotations", "image_id"))
    name = file.stem.removeprefix("captions_")
    default = (root / name, root / "images" / name, root / "images")
    folder = layout.first_folder([pathlib.Path(images)] if images else default)
    count = len(groups) if each else len(groups.whole)

    def example(index: int) -> Example:
        if index >= count:
            raise _lost(groups, *groups.lost[index - count])
        group, number = groups.group(index) if each else (index, 0)
        place = int(groups.whole[group])
        image, where = groups.above[place], groups.above.place(place)
        media = (("image", str(folder / layout.get(image, "file_name", str, where))),)
        said, at, tags = layout.grouped(groups, group, number if each else None)
        return layout.captioned(str(image["id"]), media, said, "caption", each, tags)[at]

    found = layout.not_empty(Lazy(count + len(groups.lost), example), file, "captions")
    return translated.examples(found, captions, split)


def _lost(groups: Groups, which: str, place: int) -> UserError:
    """Why a row is not part of any image's captions."""
    rows = groups.above if which == "above" else groups.below
    name = "id" if which == "above" else "image_id"
    try:
        image = layout.get(rows[place], name, (int, str), rows.place(place))
    except UserError as error:
        return error
    return UserError(f"image {image} is not in the list of images", field=rows.place(place))


def _other_form(
    file: pathlib.Path, split: str, folders: Sequence[pathlib.Path], each: bool
) -> Sequence[Example]:
    """Karpathy's file of all splits, or a list that BLIP and LAVIS have made of it."""
    path = captioned_list.below(*folders, *(folder / "images" for folder in folders))
    if file.name.startswith("dataset_"):
        return captioned_list.karpathy(file, split, path, each)
    return captioned_list.read(file, "image", path, each)


def _captions_file(root: pathlib.Path, split: str) -> pathlib.Path:
    folder = root / "annotations"
    found = litter.glob(folder, f"captions_{split}*.json")
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        hint = "Name one by the source's option 'annotations'"
        raise UserError(f"holds {names}", field=str(folder), hint=hint)
    names = [name.replace("SPLIT", split) for name in MIRRORS]
    return found[0] if found else layout.first_file(root, names)
