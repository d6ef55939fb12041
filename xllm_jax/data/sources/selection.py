"""Records picked from other sources, as `launch/build_data.py` writes such lists.

    PATH/selection.json     {"sources": {name: {"reader", "path", "split", "options"}, …},
                             "instructions": [text, …]}; paths are relative to PATH
    PATH/SPLIT.npy          `[records, 3]` int64: which source, which of its records, which
                            instruction (-1 for the record's own)

Nothing is copied: the sources stay where they are, under their licenses.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from xllm_jax.core import words
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Source
from xllm_jax.data import mixture
from xllm_jax.data.example import Example
from xllm_jax.data.media.reach import Reach
from xllm_jax.data.rows import files
from xllm_jax.data.rows.lazy import Lazy
from xllm_jax.data.sources import layout

FILE, COLUMNS = "selection.json", 3


def examples(
    path: str,
    split: str = "train",
    within: Reach | None = None,
    modalities: Mapping[str, str] | None = None,
) -> Sequence[Example]:
    """The picked records, in the order of the list; keys start with the name of their source.

    Args:
      path: folder of the layout above.
      split: 'train', 'val' or 'test'.
      within: what the sources may read; None is what each may of its own.
      modalities: {modality: 'package.module:NAME'}, the records that its sources may name; those of
        the stage are among them.

    Raises:
      UserError: no such file, code that the stage does not name, a source out of
        reach, a list of another shape, a record or
        instruction that is not there, and what the sources' readers raise; on access, too.
    """
    root = pathlib.Path(path)
    about = layout.read_json(root / FILE)
    where = str(root / FILE)
    named = sources(about, root, where)
    _check_modalities(named, modalities or {}, where)
    texts = layout.get(about, "instructions", list, where)
    picked = _picked(root / f"{split}.npy")
    opened = [mixture.read(name, source, "", within, modalities) for name, source in named.items()]
    _check(picked, [len(one) for one in opened], len(texts), str(root / f"{split}.npy"))
    names = list(named)

    def example(index: int) -> Example:
        source, record, instruction = picked[index].tolist()
        found = opened[source][record]
        asked = str(texts[instruction]) if instruction >= 0 else found.instruction
        key = f"{names[source]}/{found.key}"
        return dataclasses.replace(found, key=key, instruction=asked)

    return layout.not_empty(Lazy(len(picked), example), root, "records")


def sources(about: Mapping, root: pathlib.Path, where: str) -> dict[str, Source]:
    """The sources that a selection names, their paths made whole.

    Raises:
      UserError: a missing key.
    """
    found = {}
    for name, one in layout.get(about, "sources", dict, where).items():
        place = f"{where}.{name}"
        reader, below, split = (
            layout.get(one, key, str, place) for key in ("reader", "path", "split")
        )
        options = layout.get(one, "options", dict, place)
        found[name] = Source(reader, os.path.normpath(root / below), split, options)
    return found


def _check_modalities(named: Mapping[str, Source], known: Mapping[str, str], where: str) -> None:
    """Raises UserError where a list would import code that its user has not named."""
    for name, source in named.items():
        places = source.options.get("modalities") or {}
        if not isinstance(places, dict):
            raise UserError(f"is {words.kind(places)}, not an object", field=f"{where}.{name}")
        for modality, place in places.items():
            if known.get(modality) != place:
                what = f"would import {place!r} for the modality {modality!r}"
                hint = f"Where you trust it, name it yourself: data.modalities.{modality}={place}"
                raise UserError(what, field=f"{where}.{name}.modalities", hint=hint)


def described(named: Mapping[str, Source], root: pathlib.Path) -> dict[str, dict]:
    """What `sources` reads, of sources with paths relative to the current folder."""
    return {
        name: {
            "reader": one.reader,
            "path": os.path.relpath(os.path.abspath(one.path), os.path.abspath(root)),
            "split": one.split,
            "options": dict(one.options),
        }
        for name, one in named.items()
    }


def _picked(file: pathlib.Path) -> np.ndarray:
    found = files.array(file, "list of records", mapped=True)
    if found.ndim != 2 or found.shape[1] != COLUMNS or found.dtype.kind != "i":
        what = f"has the shape {found.shape} of {found.dtype}, not (records, {COLUMNS}) of int64"
        raise UserError(what, field=str(file))
    return found


def _check(picked: np.ndarray, sizes: list[int], texts: int, where: str) -> None:
    """Looks whether everything is there, so that a shorter source is reported at once."""
    source, record, instruction = picked.T
    if ((source < 0) | (source >= len(sizes))).any():
        raise UserError("names a source that selection.json lacks", field=where)
    if (record < 0).any() or (record >= np.asarray(sizes, np.int64)[source]).any():
        hint = "The source has changed: build the selection again"
        raise UserError("names a record that its source lacks", field=where, hint=hint)
    if ((instruction < -1) | (instruction >= texts)).any():
        raise UserError("names an instruction that selection.json lacks", field=where)
