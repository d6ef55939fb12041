"""A data set of the Hugging Face hub, or one that `save_to_disk` wrote.

    PATH     a folder of `save_to_disk`; or one of `load_dataset` (parquet, webdataset …); or, with
             the option `name`, the folder that a data set of the hub is kept in
      options={"image": "image", "answer": "caption"}     which column is what

Needs `pip install datasets`; nothing else here does. Sets of the hub (huggingface.co/datasets)
state their licenses on their pages. Media stay as they are stored until they are used.
"""

from __future__ import annotations

import itertools
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from xllm_jax.core import damage
from xllm_jax.core.errors import UserError
from xllm_jax.data.example import Example
from xllm_jax.data.media import reach
from xllm_jax.data.rows import columns, translated
from xllm_jax.data.rows.lazy import Lazy
from xllm_jax.data.sources import layout

SPLITS = {"val": "validation"}
UNDECODED = ("Image", "Audio", "Video")  # features that would decode a medium on access


def examples(
    path: str,
    split: str = "train",
    name: str = "",
    config: str = "",
    image: str = "",
    video: str = "",
    speech: str = "",
    answer: str = "",
    question: str = "",
    transcript: str = "",
    task: str = "",
    media: Mapping[str, str] | None = None,
    modalities: Mapping[str, str] | None = None,
    captions: str = "",
) -> Sequence[Example]:
    """Rows of a split, in order, read from Arrow files when they are asked for.

    Args:
      path: as above.
      split: 'train', 'val' (the hub's 'validation', where there is no 'val') or 'test'.
      name: of a data set of the hub, such as 'nlphuji/flickr30k'; PATH is its cache.
      config: of the data set, where it has several.
      image, video, speech, answer, question, transcript, task: see `data/rows/columns.py`.
      media: {modality: column} of further modalities.
      modalities: {modality: 'package.module:NAME'}, their records.
      captions: translation of the texts, as the recipe 'translated' writes it.

    Raises:
      UserError: `datasets` is not installed, no such data set, split or column; on access, a
        medium or text that is missing.
    """
    named = {"image": image, "video": video, "speech": speech, **(media or {})}
    wanted = columns.Columns(named, answer, question, transcript, task, modalities or {})
    library = _library()
    rows = _split(_open(library, path, name, config), split, name or path)
    wanted.check(rows.column_names, name or path)
    for column, feature in dict(rows.features).items():
        if type(feature).__name__ in UNDECODED:
            rows = rows.cast_column(column, getattr(library, type(feature).__name__)(decode=False))
    used = {*wanted.present().values(), answer, question, transcript} - {""}
    rows = rows.select_columns(sorted({column.partition(".")[0] for column in used}))
    where = f"{name or os.path.basename(path)}/{split}"

    def example(index: int) -> Example:
        key = f"{split}-{index}"
        return columns.example(rows[index], wanted, key, f"{where}[{index}]", 0)

    found = layout.not_empty(Lazy(len(rows), example), name or path, f"rows in {split!r}")
    return translated.examples(found, captions, split)


def _library() -> Any:
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        what = "the package `datasets` is missing"
        raise UserError(what, field="reader hugging_face", hint="pip install datasets") from error
    return datasets


def _open(library: Any, path: str, name: str, config: str) -> Any:
    reach.check_all_links(path)
    saved = ("dataset_info.json", "dataset_dict.json")
    try:
        if not name and any((pathlib.Path(path) / file).is_file() for file in saved):
            _check_saved(pathlib.Path(path))
            return library.load_from_disk(path)
        if not name and not os.path.isdir(path):
            hint = "Check the path, or name a data set of the hub by the option 'name'"
            raise UserError("no such folder", field=path, hint=hint)
        if not name:
            _check_named(library.load_dataset_builder(path, config or None).config.data_files)
        return library.load_dataset(name or path, config or None, cache_dir=path if name else None)
    except (OSError, ValueError, library.exceptions.DatasetsError) as error:
        # Of a broken file the library says that something failed; the cause says what.
        told = " ".join(str(error.__cause__ or error).split())[:200]
        raise UserError(f"cannot be opened ({told})", field=name or path) from error


def _check_saved(folder: pathlib.Path) -> None:
    """Looks where the splits and the Arrow files lie that a folder of `save_to_disk` names.

    Raises:
      UserError: out of reach, or its description is damaged.
    """
    listed = folder / "dataset_dict.json"
    with damage.reading(folder):
        names = damage.read_object(listed)["splits"] if listed.is_file() else [""]
        for split in [folder / name for name in names]:
            reach.check_opened(split)
            state = split / "state.json"
            for one in damage.read_object(state)["_data_files"] if state.is_file() else ():
                reach.check_opened(split / one["filename"])


def _check_named(splits: Mapping[str, Sequence[str]] | None) -> None:
    """Looks where the files lie that the description of a folder names, before any is read.

    Args:
      splits: {split: files}, as the library has found them.

    Raises:
      UserError: one is out of reach, or lies on another machine or in an archive.
    """
    for file in itertools.chain.from_iterable((splits or {}).values()):
        if "://" in file or "::" in file:
            hint = "Fetch it, and name the folder that it lies in"
            raise UserError("is no file of this folder", field=file, hint=hint)
        reach.check_opened(file)


def _split(opened: Any, split: str, where: str) -> Any:
    if hasattr(opened, "column_names") and isinstance(opened.column_names, list):
        if split != "train":
            raise UserError(f"has no splits, so no {split!r}", field=where, hint="Use 'train'")
        return opened
    for name in (split, SPLITS.get(split, split)):
        if name in opened:
            return opened[name]
    raise UserError(f"has no split {split!r}", field=where, hint=f"Splits: {', '.join(opened)}")
