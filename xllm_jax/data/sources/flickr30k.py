"""Flickr30k: 31,783 photographs with five captions each.

    PATH/results_20130124.token      1000092795.jpg#0, a tab, the caption; or
    PATH/results.csv                 image_name| comment_number| comment
    PATH/flickr30k-images/           the images (also flickr30k_images, images)
    PATH/dataset_flickr30k.json      Karpathy's splits {"images": [{"filename", "split"}]}; or
    PATH/train.txt, val.txt, test.txt  a split's images, one a line, as Flickr30k Entities has them

As mirrors have it: these files one folder deeper, the captions of dataset_flickr30k.json where no
other file has them, lists flickr30k_SPLIT.json as in LAVIS, or
flickr_annotations_30k.csv of nlphuji on the hub (raw, sentids, split, filename, img_id).

From shannon.cs.illinois.edu/DenotationGraph, on request; for non-commercial research, under
Flickr's terms. Without a file of splits everything is 'train'. The option `captions` reads another
file of the first form, such as a Chinese translation.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from xllm_jax.core.errors import UserError
from xllm_jax.data.example import Example
from xllm_jax.data.rows import translated
from xllm_jax.data.rows.lazy import Lazy, Lines, Rows
from xllm_jax.data.sources import captioned_list, layout

FOLDERS = ("flickr30k-images", "flickr30k_images/flickr30k_images", "flickr30k_images", "images")
KARPATHY, TABLE, HUB = "dataset_flickr30k.json", "results.csv", "flickr_annotations_30k.csv"
FILES = (
    *("results_20130124.token", "results.token", TABLE, KARPATHY, "flickr30k_SPLIT.json"),
    *("*/results_20130124.token", "*/results.token", f"*/{TABLE}", f"*/{KARPATHY}"),
    *(HUB, f"*/{HUB}"),
)


def examples(
    path: str,
    split: str = "train",
    images: str = "",
    captions: str = "",
    per_caption: bool | None = None,
) -> Sequence[Example]:
    """Captioned images, in the order of the captions file.

    Args:
      path: folder of the layout above.
      split: 'train', 'val' or 'test'.
      images: folder of the images, if it lies elsewhere.
      captions: file of other captions, or a translation, as the recipe 'translated' writes it.
      per_caption: one example for each caption; default in training only.

    Raises:
      UserError: no such file, folder or split; on access, a broken line, an empty caption.
    """
    root = pathlib.Path(path)
    own, translation = translated.told_apart(captions)
    file = pathlib.Path(own) if own else _file(root, split)
    places = [root / name for name in FOLDERS]
    folder = layout.first_folder([pathlib.Path(images)] if images else places)
    each = split == "train" if per_caption is None else per_caption
    if file.suffix == ".json" or file.name == HUB:
        found = _listed(file, split, folder, each)
        return translated.examples(layout.not_empty(found, file, "captions"), translation, split)
    said, broken = _captions(file)
    wanted = _split(root, split)
    names = [name for name in said if wanted is None or name.rsplit(".", 1)[0] in wanted]
    slots = [(name, i) for name in names for i in range(len(said[name]) if each else 1)]

    def example(index: int) -> Example:
        name, number = slots[index]
        found, at = layout.said(said[name], number if each else None, "", name)
        media = (("image", str(folder / name)),)
        return layout.captioned(name, media, found, "caption", each)[at]

    examples = layout.with_broken(Lazy(len(slots), example), broken)
    found = layout.not_empty(examples, root, f"captions for {split!r}")
    return translated.examples(found, translation, split)


def _file(root: pathlib.Path, split: str) -> pathlib.Path:
    return layout.first_file(root, [name.replace("SPLIT", split) for name in FILES])


def _listed(file: pathlib.Path, split: str, folder: pathlib.Path, each: bool) -> Sequence[Example]:
    """Karpathy's file of all splits, or a list that LAVIS has made of it."""
    place = captioned_list.below(folder, folder.parent)
    if file.name == KARPATHY:
        return captioned_list.karpathy(file, split, place, each)
    if file.name == HUB:
        return captioned_list.hub(file, split, place, each)
    return captioned_list.read(file, "image", place, each)


def _captions(file: pathlib.Path) -> tuple[dict[str, list[str]], list[UserError]]:
    """({name: captions}, what is wrong with the lines that are broken)."""
    numbered = file.name != TABLE
    lines, read = Lines(file), _token if numbered else _row
    found: dict[str, list[str]] = {}
    broken: list[UserError] = []
    for number, line in enumerate(lines.tried()):
        try:
            if isinstance(line, UserError):
                raise line
            if numbered or number:  # the table's first line names its columns
                name, caption = read(line, lines.place(number))
                found.setdefault(name, []).append(caption.strip())
        except UserError as error:
            broken.append(error)
    return found, broken


def _token(line: str, where: str) -> tuple[str, str]:
    name, tab, caption = line.partition("\t")
    name, mark, _ = name.partition("#")
    if not (tab and mark):
        raise UserError("is not a name, #, a number, a tab and a caption", field=where)
    return name, caption


def _row(line: str, where: str) -> tuple[str, str]:
    fields = line.split("|", 2)
    if len(fields) < 2:
        raise UserError("is not image_name| comment_number| comment", field=where)
    # One row of the published table lacks its second bar: '4   A dog runs across the grass .'
    caption = fields[2] if len(fields) == 3 else fields[1].strip().partition(" ")[2]
    return fields[0].strip(), caption


def _split(root: pathlib.Path, split: str) -> set[str] | None:
    """Names, without suffix, of a split's images; None for all."""
    listed, karpathy = root / f"{split}.txt", root / KARPATHY
    if listed.is_file():
        lines = Lines(listed).tried()
        return {one.strip().removesuffix(".jpg") for one in lines if isinstance(one, str)}
    if karpathy.is_file():
        rows = Rows(karpathy, name="images").tried()  # a broken one belongs to no split
        chosen = [one["filename"] for one in rows
                  if isinstance(one, dict) and one.get("split") == split
                  and isinstance(one.get("filename"), str)]  # fmt: skip
        return {name.rsplit(".", 1)[0] for name in chosen}
    if split != "train":
        hint = f"Put dataset_flickr30k.json or {split}.txt there"
        raise UserError(f"does not say which images are {split!r}", field=str(root), hint=hint)
    return None
