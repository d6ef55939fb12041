"""Wukong: a hundred million Chinese captions with links, images that users download.

    PATH/*.tar or PATH/train/*.tar      what img2dataset made of it (see webdataset.py), or
    PATH/wukong_100m_0.csv … _255.csv   (or PATH/wukong_release/) columns url and caption, perhaps
                                        dir, image or filepath: the path of an image in images/
    PATH/images/wukong_100m_0/ …        without such a column a folder for each CSV, its images
                                        called by their row, the first being 0: 12.jpg or 000012.jpg
                                        (also PATH/Data/)

From wukong-dataset.github.io/wukong-dataset; CC BY-NC-SA 4.0, the images belong to their sites.
Rows whose link was dead are left out, and so is a CSV without any image, with a warning.
The paper keeps the 10M pairs that CLIP finds most alike
(similarity above 0.45): prepare such a list first, and point this reader at it.
"""

from __future__ import annotations

import logging
import pathlib
from collections.abc import Sequence

from xllm_jax.core import litter
from xllm_jax.core.errors import UserError
from xllm_jax.data.example import Example
from xllm_jax.data.rows import files
from xllm_jax.data.rows.lazy import Chain, Table
from xllm_jax.data.rows.names import number
from xllm_jax.data.sources import cc3m, layout, table, webdataset

PATHS = ("dir", "image", "filepath")
FILES = {"train": "wukong_100m_*.csv", "val": "wukong_val*.csv", "test": "wukong_test*.csv"}


def examples(path: str, split: str = "train", images: str = "") -> Sequence[Example]:
    """Captioned images, in the order of the files.

    Args:
      path: folder of one of the layouts above.
      split: 'train', or 'val' and 'test' where such files were made.
      images: folder of the images, if it lies elsewhere.

    Raises:
      UserError: no such file or folder, no CSV that can be read and has an image; on access, a
        broken row or an empty caption.
    """
    if webdataset.has_tars(path, split):
        return webdataset.examples(path, split)
    root = pathlib.Path(path)
    found = litter.glob(root, FILES[split]) or litter.glob(root, f"*/{FILES[split]}")
    if not found:
        hint = f"Wanted: tars, or {FILES[split]}. Found there: {files.names(root) or 'nothing'}"
        raise UserError("no such files", field=str(root), hint=hint)
    places = [root / "images", root / "Data", root]
    folder = layout.first_folder([pathlib.Path(images)] if images else places)
    return layout.not_empty(Chain(_readable(found, folder)), root, "images")


def _readable(found: Sequence[pathlib.Path], folder: pathlib.Path) -> list[Sequence[Example]]:
    """The parts of the set that are there; of the others a warning says why they are left out.

    Raises:
      UserError: none is; the first one's.
    """
    parts, broken = [], []
    for file in found:
        try:
            parts.append(_read(file, folder))
        except UserError as error:
            broken.append(error)
            logging.getLogger(__name__).warning("%s: left out: %s", file, error)
    if not parts:
        raise broken[0]
    return parts


def _read(file: pathlib.Path, folder: pathlib.Path) -> Sequence[Example]:
    rows = Table(file, ("caption",))
    named = next((column for column in PATHS if column in rows.columns), None)
    if named:
        return table.read(file, named, "caption", str(folder))
    place = layout.first_folder([folder / file.stem, folder / file.stem.rsplit("_", 1)[-1]])
    return cc3m.downloaded(
        len(rows), lambda index: rows[index]["caption"], place, range(len(rows)), number
    )
