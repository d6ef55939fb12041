"""Lists of pictures or clips with captions, as mirrors and other projects keep published sets.

    [{"image": "val2014/1.jpg", "caption": "…" or ["…", …]}, …]           BLIP, LAVIS and others
    {"images": [{"filepath", "filename", "split", "sentences": [{"raw": "…"}, …]}]}     Karpathy

No reader by itself: those of COCO, Flickr30k and MSR-VTT find such files and read them by `read`.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Collection, Sequence
from typing import Any, BinaryIO

import numpy as np

from xllm_jax.data.example import Example
from xllm_jax.data.rows import json_text
from xllm_jax.data.rows.lazy import Lazy, Rows, Table
from xllm_jax.data.sources import layout

Path = Callable[[str], str]  # from a file as its row names it to where it lies


def karpathy(file: pathlib.Path, split: str, path: Path, each: bool) -> Sequence[Example]:
    """Captioned images of one split of a file of Karpathy's. Arguments as of `read`.

    Args:
      file: the file.
      split: 'train', which takes 'restval' along, 'val' or 'test'.
      path: of an image.
      each: one example for each caption.
    """
    splits = ("train", "restval") if split == "train" else (split,)
    rows = Rows(file, lambda row: _count(row, "sentences", each, splits), "images")
    return _examples(rows, "image", "filename", "sentences", path, each)


def read(
    file: pathlib.Path, modality: str, path: Path, each: bool, key: str = ""
) -> Sequence[Example]:
    """Captioned files of a list, in its order.

    Args:
      file: the list.
      modality: of its files, 'image' or 'video'.
      path: of a file.
      each: one example for each caption, where a row has several.
      key: of the file in a row; that of the modality by default.

    Raises:
      UserError: no such file, or no list; on access, a missing key, an empty caption.
    """
    rows = Rows(file, lambda row: _count(row, "caption", each, ()))
    return _examples(rows, modality, key or modality, "caption", path, each)


class Hub(Table):
    """Rows of the hub's Flickr30k, whose field `raw` holds a JSON list; see `hub`."""

    def __init__(self, file: pathlib.Path, split: str, each: bool):
        super().__init__(file, ("raw", "split", "filename"))
        rows = (row if isinstance(row, dict) else None for row in self.tried())
        counts = [_count(row, "raw", each, (split,)) for row in rows]
        self.measures = np.asarray(counts, np.int64)

    def read(self, file: BinaryIO, index: int) -> dict[str, Any]:
        """One row, see `FileRows.read`."""
        row = super().read(file, index)
        return {**row, "raw": json_text.parsed(row["raw"], f"{self.place(index)}.raw")}


def hub(file: pathlib.Path, split: str, path: Path, each: bool) -> Sequence[Example]:
    """Captioned images of a split of flickr_annotations_30k.csv. Arguments as of `karpathy`."""
    return _examples(Hub(file, split, each), "image", "filename", "raw", path, each)


def below(*folders: pathlib.Path) -> Path:
    """Where files are that rows name relative to one of some folders; the first by default."""

    def path(name: str) -> str:
        places = [os.path.join(folder, name) for folder in folders]
        return next((place for place in places if os.path.isfile(place)), places[0])

    return path


def _count(row: object, name: str, each: bool, splits: Collection[str]) -> int:
    """Examples of a row; a broken row counts once, and is reported when it is read."""
    said = row.get(name) if isinstance(row, dict) else None
    if isinstance(row, dict) and splits and row.get("split") not in splits:
        return 0
    return max(len(said), 1) if each and isinstance(said, list) and layout.few(said) else 1


def _examples(
    rows: Rows | Hub, modality: str, key: str, captions: str, path: Path, each: bool
) -> Sequence[Example]:
    places = np.repeat(np.arange(len(rows), dtype=np.int32), rows.measures)
    firsts = np.cumsum(rows.measures) - rows.measures
    task = "video_caption" if modality == "video" else "caption"

    def example(index: int) -> Example:
        place = int(places[index])
        row, where = rows[place], rows.place(place)
        name = layout.get(row, key, str, where)
        inside = layout.get(row, "filepath", str, where) if "filepath" in row else ""
        said = layout.get(row, captions, (str, list), where)
        said = [said] if isinstance(said, str) else said
        layout.check_few(said, where)
        number = index - int(firsts[place]) if each else None
        found, at = layout.said(said, number, "raw", where)
        media = ((modality, path(os.path.join(inside, name))),)
        return layout.captioned(f"{place}/{name}", media, found, task, each)[at]

    return Lazy(len(places), example)
