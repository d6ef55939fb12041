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

import csv
import io
import pathlib

from xllm_jax.core.errors import UserError
from xllm_jax.data.example import Example
from xllm_jax.data.sources import layout

Pairs = list[tuple[str, str]]


def examples(path: str, split: str = "train", per_caption: bool | None = None) -> list[Example]:
    """Caption examples, in the order of the file (or sorted by name).

    Args:
      path: folder of one of the layouts above.
      split: 'train', 'val' or 'test'.
      per_caption: one example for each caption; default in training only.

    Raises:
      UserError: no such folder, no captions, a broken or misshapen file.
    """
    root = layout.first_folder([layout.split_folder(pathlib.Path(path), split)])
    captions: dict[str, list[str]] = {}
    for name, caption in _pairs(root):
        if caption.strip():
            captions.setdefault(name, []).append(caption.strip())
    each = split == "train" if per_caption is None else per_caption
    found: list[Example] = []
    for name, said in captions.items():
        found += layout.captioned(name, (("image", str(root / name)),), said, "caption", each)
    return layout.not_empty(found, root, "captioned images")


def _pairs(root: pathlib.Path) -> Pairs:
    for name in ("captions.json", "captions.jsonl"):
        if (root / name).is_file():
            return _from_json(root / name)
    for name, mark in (("captions.csv", ","), ("captions.tsv", "\t")):
        if (root / name).is_file():
            return _from_table(root / name, mark)
    return _from_texts(root)


def _from_json(file: pathlib.Path) -> Pairs:
    data = layout.read_json_lines(file) if file.suffix == ".jsonl" else layout.read_json(file)
    if isinstance(data, dict):
        named = list(data.items())
        places = [f"{file}: {name}" for name in data]
    else:
        places = [f"{file}: [{index}]" for index in range(len(layout.rows(data, str(file))))]
        named = [
            (layout.get(row, "image", str, where), row.get("captions", row.get("caption")))
            for row, where in zip(data, places)
        ]
    pairs = []
    for (name, said), where in zip(named, places):
        said = [said] if isinstance(said, str) else said
        if not isinstance(said, list) or not all(isinstance(one, str) for one in said):
            raise UserError("has no caption", field=where, hint="A text, or a list of texts")
        pairs += [(name, one) for one in said]
    return pairs


def _from_table(file: pathlib.Path, mark: str) -> Pairs:
    table = csv.DictReader(io.StringIO(layout.read_text(file)), delimiter=mark)
    for column in ("image", "caption"):
        if column not in (table.fieldnames or ()):
            found = ", ".join(table.fieldnames or ()) or "none"
            hint = f"The first line names the columns; found: {found}"
            raise UserError(f"no column {column!r}", field=str(file), hint=hint)
    pairs = []
    for row in table:
        if not row["image"] or row["caption"] is None:
            raise UserError(f"line {table.line_num} is not complete", field=str(file))
        pairs.append((row["image"], row["caption"]))
    return pairs


def _from_texts(root: pathlib.Path) -> Pairs:
    pairs = []
    for path in sorted(root.rglob("*")):
        text = path.with_suffix(".txt")
        if path.suffix.lower() in layout.IMAGES and text.is_file():
            name = path.relative_to(root).as_posix()
            pairs += [(name, line) for line in layout.read_text(text, False).splitlines()]
    return pairs
