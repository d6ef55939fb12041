"""CC3M (Conceptual Captions): links and captions by Google, images that users download.

    PATH/*.tar or PATH/train/*.tar             what img2dataset made of it (see webdataset.py), or
    PATH/Train_GCC-training.tsv                caption, a tab, the link; for 'val'
    PATH/Validation_GCC-1.1.0-Validation.tsv
    PATH/training/, PATH/validation/           the images, called by their line, the first being 0:
                                               12_3456.jpg, 12.jpg, 00000/000000012.jpg

As mirrors have it: cc3m.tsv, with or without a first line that names the columns.

From ai.google.com/research/ConceptualCaptions; free for any purpose, the images belong to their
sites. Many links are dead, so lines without an image are left out. The paper trains on Chinese
translations: the option `captions`, a file with one line for each line of the TSV.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from xllm_jax.core.errors import UserError
from xllm_jax.data.example import Example
from xllm_jax.data.rows import translated
from xllm_jax.data.rows.lazy import Lazy, Lines
from xllm_jax.data.rows.names import Names, number
from xllm_jax.data.sources import layout, webdataset

FILES = {
    "train": (
        "Train_GCC-training.tsv",
        "*GCC[-_][Tt]rain*.tsv",
        "cc3m.tsv",
        "cc3m_train.tsv",
    ),
    "val": ("Validation_GCC-1.1.0-Validation.tsv", "*GCC*alidation*.tsv", "cc3m_val.tsv"),
}
FOLDERS = {"train": "training", "val": "validation"}


def examples(
    path: str, split: str = "train", images: str = "", captions: str = ""
) -> Sequence[Example]:
    """Captioned images, in the order of the tars or of the lines.

    Args:
      path: folder of one of the layouts above.
      split: 'train' or 'val'.
      images: folder of the images, if it lies elsewhere.
      captions: file of other captions, line by line those of the TSV; or a
        translation, as the recipe 'translated' writes it.

    Raises:
      UserError: no such split, file or folder, no image of any line, captions that are more or
        fewer than the lines; on access, a line without a tab or an empty caption.
    """
    own, translation = translated.told_apart(captions)
    if webdataset.has_tars(path, split):
        if own:
            raise UserError(
                "does not go with tars", field=own, hint="Give a translation, or the list"
            )
        return webdataset.examples(path, split, translation)
    if split not in FILES:
        raise UserError(f"has no split {split!r}", field=path, hint="Choices: train, val")
    root = pathlib.Path(path)
    lines = Lines(layout.first_file(root, FILES[split]))
    said, head = Lines(own) if own else lines, _head(lines)
    count, first = len(lines) - head, 0 if own else head
    if len(said) - first != count:
        what = f"has {len(said)} lines for {count} in {lines.path}"
        raise UserError(what, field=own, hint="One caption for each line")

    def caption(index: int) -> str:
        text, mark, _ = said[index + first].partition("\t")
        if not (mark or own):
            raise UserError("has no tab between caption and link", field=said.place(index + first))
        return text

    folders = [root / FOLDERS[split], root / "images", root / split]
    folder = layout.first_folder([pathlib.Path(images)] if images else folders)
    found = downloaded(count, caption, folder, range(count), number)
    return translated.examples(found, translation, split)


def _head(lines: Lines) -> int:
    """1 where the first line names the columns, as img2dataset's recipe adds it, else 0."""
    first = next(lines.tried(range(min(len(lines), 1))), "")
    return int(isinstance(first, str) and first.split("\t")[:2] == ["caption", "url"])


def downloaded(
    count: int,
    caption: Callable[[int], str],
    folder: pathlib.Path,
    keys: Sequence[int | str],
    key: Callable[[str], int | str | None],
) -> Sequence[Example]:
    """Rows of a list of links whose images are there; dead links are left out.

    Args:
      count: rows of the list.
      caption: of a row; may raise UserError.
      folder: the images.
      keys: of every row.
      key: from the name of an image to its key.

    Raises:
      UserError: no row has an image; on access, what `caption` raises, and an empty caption.
    """
    names = Names(folder, key)
    places = names.find(keys)
    rows = np.flatnonzero(places >= 0)

    def example(index: int) -> Example:
        row = int(rows[index])
        where = f"{folder}: row {row}"
        return layout.captioned_image(
            f"{folder.name}-{row}", names.path(places[row]), caption(row), where
        )

    what = f"images of the {count} rows of the list"
    return layout.not_empty(Lazy(len(rows), example), folder, what)
