"""A folder of captioned images: users' own, or sets that tools unpack this way.

Any one of these, looked for in this order in PATH/SPLIT, or in PATH for 'train':

    captions.json    {"a.jpg": "…", "b.jpg": ["…", "…"]} or [{"image": "a.jpg", "caption": "…"}, …]
    captions.jsonl   {"image": "a.jpg", "caption": "…"} on each line
    captions.csv     a header with the columns image and caption; several rows per image are fine
    captions.tsv     the same with tabs
    a.jpg, a.txt     for every image a text file of the same name, one caption a line

Image names are relative to the folder.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Sequence

from xllm_jax.core import litter
from xllm_jax.core.errors import UserError
from xllm_jax.core.text_lines import split_lines
from xllm_jax.data.example import Example
from xllm_jax.data.rows import translated
from xllm_jax.data.rows.lazy import Rows, Table
from xllm_jax.data.sources import layout

Pairs = Iterable[tuple[str, Sequence[str]] | UserError]


def examples(
    path: str, split: str = "train", per_caption: bool | None = None, captions: str = ""
) -> Sequence[Example]:
    """Caption examples, in the order of the file (or sorted by name); broken rows come last.

    Args:
      path: folder of one of the layouts above.
      split: 'train', 'val' or 'test'.
      per_caption: one example for each caption; default in training only.
      captions: translation of the texts, as the recipe 'translated' writes it.

    Raises:
      UserError: no such folder, no captions, a misshapen file; on access, a broken row.
    """
    root = layout.first_folder([layout.split_folder(pathlib.Path(path), split)])
    named: dict[str, list[str]] = {}
    broken: list[UserError] = []
    for pair in _pairs(root):
        if isinstance(pair, UserError):
            broken.append(pair)
            continue
        said = [caption.strip() for caption in pair[1] if caption.strip()]
        if len(said) < max(len(pair[1]), 1):
            broken.append(UserError("has an empty caption", field=str(root / pair[0])))
        if said:
            named.setdefault(pair[0], []).extend(said)
    each = split == "train" if per_caption is None else per_caption
    found: list[Example] = []
    for name, said in named.items():
        found += layout.captioned(name, (("image", str(root / name)),), said, "caption", each)
    every = layout.not_empty(layout.with_broken(found, broken), root, "captioned images")
    return translated.examples(every, captions, split)


def _pairs(root: pathlib.Path) -> Pairs:
    for name in ("captions.json", "captions.jsonl"):
        if (root / name).is_file():
            return _from_json(Rows(root / name, objects=True))
    for name in ("captions.csv", "captions.tsv"):
        if (root / name).is_file():
            return _from_table(Table(root / name, ("image", "caption")))
    return _from_texts(root)


def _from_json(rows: Rows) -> Pairs:
    for index, row in enumerate(rows.tried()):
        where = rows.place(index)
        try:
            if isinstance(row, UserError):
                raise row
            if rows.names is not None:
                name, said = rows.names[index], row
            else:
                name = layout.get(row, "image", str, where)
                said = row.get("captions", row.get("caption"))
            said = [said] if isinstance(said, str) else said
            if not isinstance(said, list) or not all(isinstance(one, str) for one in said):
                raise UserError("has no caption", field=where, hint="A text, or a list of texts")
            yield name, said
        except UserError as error:
            yield error


def _from_table(table: Table) -> Pairs:
    for index, row in enumerate(table.tried()):
        if isinstance(row, UserError):
            yield row
        elif not row["image"].strip():
            yield UserError("names no image", field=table.place(index))
        else:
            yield row["image"].strip(), [row["caption"]]


def _from_texts(root: pathlib.Path) -> Pairs:
    walked = litter.walk(root, lambda name: layout.ending(name) in layout.IMAGES)
    for path in sorted(pathlib.Path(place, name) for place, names in walked for name in names):
        text = path.with_suffix(".txt")
        if text.is_file():
            try:
                said = [line for line in split_lines(layout.read_text(text)) if line.strip()]
                yield path.relative_to(root).as_posix(), said
            except UserError as error:
                yield error
