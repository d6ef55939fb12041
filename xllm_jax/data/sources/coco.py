"""COCO captions, and other sets that are kept in COCO's form.

    PATH/annotations/captions_SPLIT*.json     {"images": [{"id", "file_name"}, …],
                                               "annotations": [{"image_id", "caption"}, …]}
    PATH/SPLIT*/ or PATH/images/SPLIT*/       the images, called as the captions file is: train2014/

From cocodataset.org; annotations CC BY 4.0, images under Flickr's terms. Our own worlds add "tags"
to annotations.
"""

from __future__ import annotations

import pathlib

from xllm_jax.core.errors import UserError
from xllm_jax.data.example import Example
from xllm_jax.data.sources import layout


def examples(
    path: str,
    split: str = "train",
    images: str = "",
    annotations: str = "",
    per_caption: bool | None = None,
) -> list[Example]:
    """Caption examples of a split, in the order of the images.

    Args:
      path: folder of the layout above.
      split: 'train', 'val' or 'test'.
      images: folder of the images, if it lies elsewhere.
      annotations: the captions file, if it has another name.
      per_caption: one example for each caption; default in training only. Otherwise one per image.

    Raises:
      UserError: no such file or folder, broken JSON, a missing key, an annotation of no image.
    """
    root = pathlib.Path(path)
    file = pathlib.Path(annotations) if annotations else _captions_file(root, split)
    data = layout.read_json(file)
    name = file.stem.removeprefix("captions_")
    default = (root / name, root / "images" / name, root / "images")
    folder = layout.first_folder([pathlib.Path(images)] if images else default)
    names = _file_names(data, file)
    captions: dict[int | str, list[str]] = {}
    tags: dict[int | str, tuple[str, ...]] = {}
    for index, row in enumerate(layout.get(data, "annotations", list, str(file))):
        where = f"{file}: annotations[{index}]"
        image = layout.get(row, "image_id", (int, str), where)
        if image not in names:
            raise UserError(f"image {image} is not in the list of images", field=where)
        captions.setdefault(image, []).append(layout.get(row, "caption", str, where).strip())
        tags.setdefault(image, layout.tags(row))
    each = split == "train" if per_caption is None else per_caption
    found: list[Example] = []
    for image, file_name in names.items():
        if image in captions:
            media = (("image", str(folder / file_name)),)
            said = captions[image]
            found += layout.captioned(str(image), media, said, "caption", each, tags[image])
    return layout.not_empty(found, file, "captions")


def _captions_file(root: pathlib.Path, split: str) -> pathlib.Path:
    folder = root / "annotations"
    found = sorted(folder.glob(f"captions_{split}*.json"))
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        mend = "Name one by the source's option 'annotations'"
        raise UserError(f"holds {names}", field=str(folder), mend=mend)
    return found[0] if found else folder / f"captions_{split}.json"


def _file_names(data, file: pathlib.Path) -> dict[int | str, str]:
    names = {}
    for index, row in enumerate(layout.get(data, "images", list, str(file))):
        where = f"{file}: images[{index}]"
        image = layout.get(row, "id", (int, str), where)
        names[image] = layout.get(row, "file_name", str, where)
    return names
