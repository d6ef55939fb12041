"""Flickr30k: 31,783 photographs with five captions each.

    PATH/results_20130124.token      1000092795.jpg#0, a tab, the caption; or
    PATH/results.csv                 image_name| comment_number| comment
    PATH/flickr30k-images/           the images (also flickr30k_images, images)
    PATH/dataset_flickr30k.json      Karpathy's splits {"images": [{"filename", "split"}]}; or
    PATH/train.txt, val.txt, test.txt  a split's images, one a line, as Flickr30k Entities has them

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
from xllm_jax.data.sources import layout

FOLDERS = ("flickr30k-images", "flickr30k_images", "images")


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
    said, broken = _captions(root, own)
    places = [root / name for name in FOLDERS]
    folder = layout.first_folder([pathlib.Path(images)] if images else places)
    wanted = _split(root, split)
    names = [name for name in said if wanted is None or name.rsplit(".", 1)[0] in wanted]
    each = split == "train" if per_caption is None else per_caption
    slots = [(name, i) for name in names for i in range(len(said[name]) if each else 1)]

    def example(index: int) -> Example:
        name, number = slots[index]
        found, at = layout.said(said[name], number if each else None, "", name)
        media = (("image", str(folder / name)),)
        return layout.captioned(name, media, found, "caption", each)[at]

    examples = layout.with_broken(Lazy(len(slots), example), broken)
    found = layout.not_empty(examples, root, f"captions for {split!r}")
    return translated.examples(found, translation, split)


def _captions(root: pathlib.Path, captions: str) -> tuple[dict[str, list[str]], list[UserError]]:
    """({name: captions}, what is wrong with the lines that are broken)."""
    token, table = root / "results_20130124.token", root / "results.csv"
    numbered = captions or token.is_file() or not table.is_file()
    lines, read = (Lines(captions or token), _token) if numbered else (Lines(table), _row)
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
    listed, karpathy = root / f"{split}.txt", root / "dataset_flickr30k.json"
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
