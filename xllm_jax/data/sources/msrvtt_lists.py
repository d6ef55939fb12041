"""CLIP4Clip's lists of MSR-VTT: which videos are of a split, where it is not the publisher's.

    MSRVTT_train.9k.csv, MSRVTT_train.7k.csv     video_id
    MSRVTT_JSFUSION_test.csv                     key,vid_key,video_id,sentence

No reader by itself: `msrvtt.py` finds them. A list with sentences is the captions of its split; one
of names alone chooses among the videos of the other files.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Mapping, Sequence

from xllm_jax.core import litter
from xllm_jax.core.errors import UserError
from xllm_jax.data.example import Example
from xllm_jax.data.rows.lazy import Lazy, Table
from xllm_jax.data.sources import layout

FILES = {
    "train": ("MSRVTT_train.9k.csv", "MSRVTT_train.7k.csv", "MSRVTT_train*.csv"),
    "val": ("MSRVTT_val*.csv",),
    "test": ("MSRVTT_JSFUSION_test.csv", "MSRVTT_test*.csv"),
}
VIDEO, SENTENCE = "video_id", "sentence"


def tables(root: pathlib.Path) -> dict[str, Table]:
    """{split: its list} of the splits that have one, in the folder or one deeper.

    Raises:
      UserError: a list does not name videos.
    """
    found = {}
    for split, names in FILES.items():
        there = [file for name in names for file in litter.glob(root, name)]
        there = there or [file for name in names for file in litter.glob(root, f"*/{name}")]
        if there:
            found[split] = Table(there[0], (VIDEO,))
    return found


def has_sentences(table: Table | None) -> bool:
    """Whether a list holds the captions of its split."""
    return table is not None and SENTENCE in table.columns


def chooser(
    found: Mapping[str, Table], split: str
) -> tuple[Callable[[str, bool], bool], list[UserError]]:
    """Which videos are of a split, and what is wrong with the rows of its list that are broken.

    Returns:
      a function of a video's name and of whether the other files say that it is of the split. The
      split's list decides; without one, a video that the list of another split names is of that.
    """
    named = {name: _names(table) for name, table in found.items()}
    own = named.get(split)
    if own is not None:
        return lambda name, _: name in own[0], own[1]
    taken = set().union(*(names for names, _ in named.values()))
    return lambda name, said: said and name not in taken, []


def read(table: Table, path: Callable[[str], str], each: bool) -> Sequence[Example]:
    """Captioned videos of a list with sentences, in its order.

    Args:
      table: the list.
      path: of a video.
      each: one example for each sentence, where a video has several.
    """
    rows: dict[str, list[int]] = {}
    broken = []
    for index, row in enumerate(table.tried()):
        try:
            rows.setdefault(_name(row, table.place(index)), []).append(index)
        except UserError as error:
            broken.append(error)
    slots = [(name, n) for name, own in rows.items() for n in range(len(own) if each else 1)]

    def example(index: int) -> Example:
        name, number = slots[index]
        layout.check_few(rows[name], table.place(rows[name][0]))
        texts = [row[SENTENCE] for row in table.tried(rows[name])]
        where = table.place(rows[name][number])
        found, at = layout.said(texts, number if each else None, "", where)
        media = (("video", path(name)),)
        return layout.captioned(name, media, found, "video_caption", each)[at]

    return layout.with_broken(Lazy(len(slots), example), broken)


def _names(table: Table) -> tuple[set[str], list[UserError]]:
    names, broken = set(), []
    for index, row in enumerate(table.tried()):
        try:
            names.add(_name(row, table.place(index)))
        except UserError as error:
            broken.append(error)
    return names, broken


def _name(row: dict[str, str] | UserError, where: str) -> str:
    """The video of a row, without its suffix."""
    if isinstance(row, UserError):
        raise row
    name = row[VIDEO].strip()
    stem, suffix = os.path.splitext(name)
    if not name:
        raise UserError("names no video", field=where)
    return stem if suffix.lower() in layout.VIDEOS else name
