"""A table of any size with the paths of images and their captions, as OpenCLIP and others use it.

    PATH                          a .csv or .tsv file, or a folder: PATH/SPLIT.tsv or PATH/SPLIT.csv
      filepath,title              the first line names the columns; others are ignored
      a/1.jpg,一只猫

Paths are relative to the table's folder, or to the option `images`. Small folders are easier with
`captions_folder`; this reader keeps one number per row.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence

from xllm_jax.core.errors import UserError
from xllm_jax.data.example import Example
from xllm_jax.data.rows import translated
from xllm_jax.data.rows.lazy import Lazy, Table
from xllm_jax.data.sources import layout


def examples(
    path: str,
    split: str = "train",
    image: str = "filepath",
    caption: str = "title",
    images: str = "",
    captions: str = "",
) -> Sequence[Example]:
    """Captioned images, in the order of the table.

    Args:
      path: file or folder of the layout above.
      split: 'train', 'val' or 'test'.
      image: name of the column with the paths.
      caption: name of the column with the captions.
      images: folder that the paths start from, if it is another one.
      captions: translation of the texts, as the recipe 'translated' writes it.

    Raises:
      UserError: no such file or column, no rows; on access, a broken row or an empty caption.
    """
    root = pathlib.Path(path)
    files = [root] if root.is_file() else [root / f"{split}{end}" for end in (".tsv", ".csv")]
    file = next((one for one in files if one.is_file()), files[-1])
    found = layout.not_empty(read(file, image, caption, images), file, "rows")
    return translated.examples(found, captions, split)


def read(file: pathlib.Path, image: str, caption: str, images: str = "") -> Lazy:
    """The rows of one table. Arguments and errors as in `examples`."""
    table, folder = Table(file, (image, caption)), images or str(file.parent)

    def example(index: int) -> Example:
        row, where = table[index], table.place(index)
        if not row[image].strip():
            raise UserError("names no image", field=where)
        path = os.path.join(folder, row[image].strip())
        return layout.captioned_image(f"{file.stem}-{index}", path, row[caption], where)

    return Lazy(len(table), example)
